"""Settings of finetune: the number of steps, and the way through JSON."""

import json

import pytest

from lora_fast.cli.inputs.settings import Settings


@pytest.mark.parametrize(("blocks", "epochs", "steps"), [(8, 1, 2), (9, 1, 3), (9, 2, 6), (1, 3, 3)])
def test_total_steps_of_epochs_are_those_of_the_trainer(blocks, epochs, steps):
    settings = Settings(batch=2, accumulation=2, epochs=epochs)
    assert settings.total_steps(blocks) == steps


def test_settings_survive_json():
    settings = Settings(method=("lora", "ilora:lam=1"), compare=True)
    assert Settings(**json.loads(json.dumps(settings.as_dict()))) == settings
