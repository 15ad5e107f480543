"""Forget what one contributor gave, and say what the evidence allows to be said.

`python forget.py` subtracts the recorded steps, repairs, and writes the ledger; it needs no second process, whatever
number has recorded. A method that trains runs on as many processes as it is given, however they are started:
`python forget.py --devices 2 --method scrub`.
"""

from typing import Any

from common import SEED, keys_of, parser, trainer_arguments
from lightning.pytorch.utilities import rank_zero_only

from lightning_unlearn import FineTune, evaluate, unlearn
from lightning_unlearn.demo.digits import DigitsCNN, DigitsData
from lightning_unlearn.methods import LossMethod
from lightning_unlearn.methods.config import as_method


def main() -> None:
    """Forget one contributor."""
    arguments = parser("Forget a contributor.")
    arguments.add_argument("--method", default="partial-amnesiac")
    arguments.add_argument("--contributor", default="mislabelled")
    arguments.add_argument("--repair", type=int, default=50, help="steps of repair after a subtraction")
    given = arguments.parse_args()

    method = as_method(given.method)
    trains = isinstance(method, LossMethod)
    if not trains and given.devices * given.num_nodes > 1:
        raise SystemExit(f"{given.method} changes the weights without training: run it with --devices 1.")
    data = DigitsData(SEED)
    keys = keys_of(data)
    original = DigitsCNN.load_from_checkpoint(given.folder / "trained.ckpt", map_location="cpu")
    common: dict[str, Any] = {
        "method": method,
        "data": data,
        "store": given.folder / "store",
        "trainer": {**trainer_arguments(given), "enable_checkpointing": False},
        "then": None if trains else FineTune(max_steps=given.repair),
        "sample_keys": keys,
        "seed": SEED,
    }
    result = unlearn(original, [given.contributor], **common)
    if rank_zero_only.rank > 0:
        return  # every process has the same weights now, and one of them is enough to look at them
    result.save(given.folder / "unlearned.ckpt")
    # The same with an innocent contributor's steps shows whether it was theirs that counted.
    placebo = None if trains else unlearn(original, ["bystander"], control_for=[given.contributor], **common).model
    evaluation = evaluate(
        original,
        result.model,
        [given.contributor],
        data=data,
        placebo=placebo,
        true_targets=data.true_labels[list(data.contributors[given.contributor])],
        sample_keys=keys,
    )
    print(evaluation.verdict)


if __name__ == "__main__":
    main()
