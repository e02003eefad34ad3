"""The short version of the supervisor; ``make test-reliability`` is the long one."""

from __future__ import annotations

import torch

from tests.reliability.supervisor import differences, supervise, tensors


def test_killed_runs_end_with_the_same_bits(tmp_path):
    summary = supervise(tmp_path, (2, 3), kills=1, seed=0, epochs=3)
    print(summary)
    assert summary.kills == 2
    assert summary.differences == summary.corruptions_loaded_wrong == 0, summary.details
    assert summary.corruptions_tried >= 100


def test_a_difference_would_be_seen(tmp_path):
    for name, weight in (("a", 1.0), ("b", 1.0 + 2**-23)):
        folder = tmp_path / name
        folder.mkdir()
        state = {
            "state_dict": {"v_head.weight": torch.tensor([weight])},
            "optimizer": {"step": torch.tensor(3.0)},
        }
        torch.save(state, folder / "iter_2.pth")
        (folder / "last_checkpoint").write_text(str(folder / "iter_2.pth"))
        (folder / "x" / "vis_data").mkdir(parents=True)
        (folder / "x" / "vis_data" / "scalars.json").write_text(f'{{"step": 1, "loss": {weight}}}\n')
    found = differences(tmp_path / "a", tmp_path / "b")
    assert found == ["iter_2.pth: /state_dict/v_head.weight", "loss of step 1"]
    assert differences(tmp_path / "a", tmp_path / "a") == []
    assert set(tensors(state)) == {"/state_dict/v_head.weight", "/optimizer/step"}
