# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Serves a model with early exits: OpenAI's completions and chat, and a page that shows the exits.

python scripts/megatron_gpt_ee_server.py gpt_model_file=model.nemo adapter_file=exits.nemo
"""

import sys

from omegaconf import DictConfig, OmegaConf

from nemo_ee.runtime.script import script, user_errors

EXTRA = ("fastapi", "prometheus_client", "starlette", "uvicorn")


@script("megatron_gpt_ee_server")
def main(cfg: DictConfig) -> None:
    """Restores the model and answers requests until SIGINT or SIGTERM."""
    with user_errors(cfg):
        from nemo_ee.server.settings import ServerConfig

        values = OmegaConf.to_container(cfg, resolve=True)
        trainer = values.pop("trainer")
        config = ServerConfig.from_dict({**values, "precision": trainer["precision"]})

        from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder

        try:
            from nemo_ee.server.serve import serve
        except ModuleNotFoundError as error:
            if error.name not in EXTRA:
                raise
            sys.exit(
                f"error: {error.name} is not installed; the server needs its extra: pip install 'nemo_ee[server]'"
            )

        model = {"precision": config.precision, "megatron_amp_O2": config.megatron_amp_O2}
        settings = OmegaConf.create({"trainer": trainer, "model": model})
        serve(config, EarlyExitTrainerBuilder(settings).create_trainer())


if __name__ == "__main__":
    main()
