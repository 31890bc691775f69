"""What a folder has to hold so that its training goes on: no step that was begun is left out of the count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dp_lora.errors import UserError
from dp_lora.privacy.ledger import Charge
from dp_lora.storage.files import write_json
from dp_lora.training.receipts import check_begun, check_record, check_same_mechanism, check_same_plan
from tests.builders.private_training import plan_of

PLAN = plan_of()


@pytest.mark.parametrize("left", ["state.pt", "finished"])
def test_what_steps_have_left_needs_the_record_of_them(left: str, tmp_path: Path) -> None:
    record = tmp_path / "executions.jsonl"
    check_begun(tmp_path)
    record.touch()
    check_begun(tmp_path)
    (tmp_path / left).touch()
    for lose in (lambda: None, record.unlink):
        lose()
        with pytest.raises(
            UserError, match=rf"executions\.jsonl: is not there or empty, and {left} beside it"
        ):
            check_begun(tmp_path)
    record.write_text("{}\n")
    check_begun(tmp_path)


def test_a_record_names_as_many_executions_as_were_settled(tmp_path: Path) -> None:
    check_record(30, 30, tmp_path)
    check_record(31, 30, tmp_path)
    with pytest.raises(UserError, match="names 29 executions"):
        check_record(29, 30, tmp_path)


def test_a_record_names_as_many_executions_as_were_stated(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_json(tmp_path / "privacy.json", {"steps": 30})
    check_record(0, 0, folder)  # that of another run, whose `checkpoint/` was removed
    write_json(folder / "plan.json", {})
    check_record(30, 0, folder)
    with pytest.raises(UserError, match=r"names 29 executions, and privacy\.json states 30"):
        check_record(29, 0, folder)


def test_another_plan_than_that_of_the_first_step_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "plan.json", PLAN.to_dict())
    check_same_plan(PLAN, tmp_path)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"max_grad_norm": 0.4}, "max_grad_norm=0.5 and now has 0.4: the private examples or the plan"),
        ({"clipping": "automatic"}, "clipping='flat' and now has 'automatic'"),
    ]
    for changed, said in changes:
        with pytest.raises(UserError, match=f"this run began with {said}"):
            check_same_plan(replace(PLAN, **changed), tmp_path)
    for content in ("[]", "{}"):
        (tmp_path / "plan.json").write_text(content)
        with pytest.raises(UserError, match="no plan of a run"):
            check_same_plan(PLAN, tmp_path)


@pytest.mark.parametrize("field", ["noise_multiplier", "sample_rate"])
def test_noise_and_rate_may_differ_by_a_millionth_as_a_calibration_does(field: str, tmp_path: Path) -> None:
    before = Charge("a", "mnist", PLAN.mechanism, PLAN.delta)

    def now(factor: float) -> Charge:
        changed = {field: getattr(PLAN.mechanism, field) * factor}
        return replace(before, mechanism=replace(PLAN.mechanism, **changed))

    for factor in (1 + 0.8e-6, 1 - 0.8e-6):
        check_same_mechanism(now(factor), [before], tmp_path)
    for factor in (1 + 1.2e-6, 1 - 1.2e-6):
        with pytest.raises(UserError, match="this run began with noise multiplier"):
            check_same_mechanism(now(factor), [before], tmp_path)
        check_same_mechanism(now(factor), [replace(before, run="b")], tmp_path)
