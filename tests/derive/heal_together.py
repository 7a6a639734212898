"""What test_healing.py starts several of: heal_together.py FOLDER [STEP to stop after | "different"]."""

import dataclasses
import os
import sys
from pathlib import Path

import torch
from derive.changing import fresh
from derive.test_healing import PLAN, SETTINGS, TOKENS

from llmdrop_utils import heal

folder, what = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
rank = int(os.environ["RANK"])


steps = []


def on_step(step, loss):
    steps.append(step)
    if str(step) == what:
        raise SystemExit(f"stopped after step {step}")


model = fresh()
model.load_state_dict(torch.load(folder / "model.pt"))
if what == "different":
    model.model.layers[0].mlp.up_proj.weight.data += rank
settings = dataclasses.replace(SETTINGS, tokens=SETTINGS.tokens - TOKENS.shape[1])  # a batch that is not whole
losses = heal(model, TOKENS, PLAN, folder / "checkpoints", settings, on_step=on_step)
torch.save((losses, model.state_dict(), steps), folder / f"{rank}.pt")
