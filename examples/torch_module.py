"""Private training of a plain torch model: a classifier of scikit-learn's 8x8 digits.

    python examples/torch_module.py OUT

OUT gets the parameters and privacy.json. OUT/private holds the noise key and the checkpoint: keep it private.
Give the same command again to resume.
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from dp_lora import PrivateTraining, make_plan

digits = load_digits()
images, labels = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
images, labels, unseen, answers = images[:1400], labels[:1400], images[1400:], labels[1400:]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
out = Path(sys.argv[1])

plan = make_plan(
    num_examples=1400, expected_batch_size=280, steps=100, target_epsilon=5.0, delta=1e-4, max_grad_norm=1.0
)
private = PrivateTraining(
    model,
    torch.optim.Adam(model.parameters(), lr=0.01),
    plan,
    folder=out / "private",
    synthetic_losses=lambda rows: F.cross_entropy(
        model(torch.eye(4, 64)[rows]), torch.arange(4)[rows], reduction="none"
    ),
)
for step in private.steps():
    for rows, weights, _ in step.microbatches(256):
        step.add(F.cross_entropy(model(images[rows]), labels[rows], reduction="none"), weights)
    step.apply()

torch.save(model.state_dict(), out / "model.pt")
private.statement().save(out / "privacy.json")
accuracy = (model(unseen).argmax(1) == answers).float().mean()
print(f"accuracy on other images {accuracy:.3f}, epsilon {private.statement().epsilon:.2f}")
