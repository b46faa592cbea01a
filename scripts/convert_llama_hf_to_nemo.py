# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Converts a Hugging Face Llama-family directory, or a GGUF file, to a NeMo checkpoint.

python scripts/convert_llama_hf_to_nemo.py input_name_or_path=DIRECTORY output_path=model.nemo
"""

from omegaconf import DictConfig

from nemo_ee.files.output import claim
from nemo_ee.runtime.script import script, user_errors


@script("convert_llama_hf_to_nemo", alone=True)
def main(cfg: DictConfig) -> None:
    """Reads the configuration, converts, and says where the result lies."""
    with user_errors(cfg):
        from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

        with claim(str(cfg.output_path)):
            path = convert_to_nemo(cfg.input_name_or_path, cfg.output_path, str(cfg.precision), cfg.overwrite)
        print(f"wrote {path} ({path.stat().st_size / 2**20:.0f} MiB)")


if __name__ == "__main__":
    main()
