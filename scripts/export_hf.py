# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Exports a NeMo checkpoint, or one of its exits, as a Hugging Face folder.

python scripts/export_hf.py kind=base gpt_model_file=model.nemo output_path=model_hf
python scripts/export_hf.py kind=draft gpt_model_file=model.nemo adapter_file=exits.nemo layer=8 output_path=draft_hf
python scripts/export_hf.py kind=remote gpt_model_file=model.nemo adapter_file=exits.nemo output_path=exits_hf
"""

from omegaconf import DictConfig, OmegaConf

from nemo_ee.export.settings import ExportConfig
from nemo_ee.runtime.script import script, user_errors


@script("export_hf", alone=True)
def main(cfg: DictConfig) -> None:
    """Exports and says where the result lies."""
    with user_errors(cfg, nemo=False):
        config = ExportConfig.from_dict(OmegaConf.to_container(cfg, resolve=True))
    with user_errors():
        from nemo_ee.export.export import export

        path = export(config)
        size = sum(file.stat().st_size for file in path.iterdir())
        print(f"wrote {path} ({size / 2**20:.0f} MiB)")


if __name__ == "__main__":
    main()
