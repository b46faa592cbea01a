# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`nemo-ee COMMAND …`: the scripts, wherever nemo_ee is installed.

A wheel has the repository's scripts/ and conf/ as nemo_ee/scripts and nemo_ee/conf. A command runs the script's own
file, as `python` would; so do the processes that it starts itself.
"""

import ast
import difflib
import re
import runpy
import sys
from pathlib import Path

from nemo_ee import __version__

_PACKAGE = Path(__file__).parents[1]
IN_A_WHEEL = (_PACKAGE / "scripts").is_dir()
_ROOT = _PACKAGE if IN_A_WHEEL else _PACKAGE.parent
SCRIPTS, CONF = _ROOT / "scripts", _ROOT / "conf"

COMMANDS = {
    "fetch": "fetch_package_file",
    "convert": "convert_llama_hf_to_nemo",
    "preprocess": "preprocess_text",
    "tokenizer": "train_tokenizer",
    "answer": "generate_tuning_text",
    "tune": "megatron_gpt_ee_tuning",
    "pretrain": "megatron_gpt_ee_pretraining",
    "calibrate": "calibrate_early_exit",
    "generate": "megatron_gpt_ee_generate",
    "serve": "megatron_gpt_ee_server",
    "evaluate": "evaluate_early_exit",
    "merge": "merge_early_exits",
    "edit": "edit_early_exits",
    "export": "export_hf",
    "lm-eval": "lm_eval_early_exit",
}
"""Command -> the script that it runs."""


def main() -> None:
    """Runs the command that the command line names."""
    match sys.argv[1:]:
        case [] | ["-h" | "--help"]:
            print(_help())
        case ["--version"]:
            print(f"nemo_ee {__version__}")
        case [name, *arguments] if name in COMMANDS:
            path = str(SCRIPTS / f"{COMMANDS[name]}.py")
            sys.argv[:] = [path, *arguments]
            runpy.run_path(path, run_name="__main__")
        case [name, *_]:
            nearest = difflib.get_close_matches(name, COMMANDS, 1)
            remedy = f"did you mean {nearest[0]}?" if nearest else "nemo-ee --help lists all"
            sys.exit(f"error: {name}: there is no such command; {remedy}")


def _help() -> str:
    """One line per command: the first of its script's docstring."""
    lines = ["nemo-ee COMMAND [key=value ...]", ""]
    for command, script in COMMANDS.items():
        docstring = (
            ast.get_docstring(ast.parse((SCRIPTS / f"{script}.py").read_text(encoding="utf-8"))) or script
        )
        lines.append(f"  {command:<10} {docstring.splitlines()[0]}")
    return "\n".join([*lines, "", f"nemo-ee COMMAND --help says more. All keys: {CONF}"])


def as_installed(text: str) -> str:
    """A text that names scripts, with the commands in their place where there is no repository to run them in."""
    commands = {script: command for command, script in COMMANDS.items()}

    def command(found: re.Match[str]) -> str:
        return f"nemo-ee {commands[found[1]]}" if found[1] in commands else found[0]

    return re.sub(r"(?:python )?(?:\S*/)?\bscripts/(\w+)\.py", command, text) if IN_A_WHEEL else text


if __name__ == "__main__":
    main()
