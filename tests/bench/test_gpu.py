"""What `make gpu` runs: stages that are kept, and decoders that decode, on a CPU and small."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import captured
import gpu
import shapes

ROOT = Path(__file__).parents[2]


def script(text):
    return [sys.executable, "-c", text]


def run(tmp_path, *options):
    sys.argv = ["gpu.py", "--model", "M", "--device", "cpu", "--output", str(tmp_path / "gpu.json")]
    sys.argv += options
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return ended.value.code, json.loads((tmp_path / "gpu.json").read_text())["stages"]


def test_what_has_passed_is_not_run_again(tmp_path, monkeypatch):
    counted = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    found = tmp_path / "found.json"
    made = {
        "good": gpu.Stage(script(f"{counted}; open({str(found)!r}, 'w').write('[1]')"), found),
        "bad": gpu.Stage(script("raise SystemExit(3)")),
        "slow": gpu.Stage(script("import time; time.sleep(60)")),
        "absent": gpu.Stage(["no-such-program"]),
    }
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(gpu, "stages", lambda *_: made)
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu, "LIMIT", 2)
    for _ in range(2):
        code, stages = run(tmp_path)
        assert code == 1
        assert stages["good"]["outcome"] == "passed" and stages["good"]["found"] == [1]
        assert stages["bad"]["outcome"].startswith("failed: see")
        assert stages["slow"]["outcome"].startswith("not done in 2 s")
        assert stages["absent"]["outcome"] == "left out: no-such-program is not installed"
        assert (tmp_path / "runs").read_text() == "x"
    run(tmp_path, "--only", "good", "--again")
    assert (tmp_path / "runs").read_text() == "xx"


def test_every_stage_is_a_program_that_is_here():
    for stage in gpu.stages("M", "cuda").values():
        scripts = [word for word in stage.command if word.startswith(("bench/", "tests/"))]
        assert all((ROOT / script).exists() for script in scripts), stage.command


def test_decoders_of_every_form_decode(tmp_path, monkeypatch, capsys):
    small = shapes.Shape("llama", 64, 96, 2, 2, 1, 32, 260)
    monkeypatch.setattr(captured, "MADE", {"8B": small})
    given = ["--device", "cpu", "--blocks", "2", "--prompt", "16", "--new_tokens", "4"]
    place = tmp_path / "captured.json"
    monkeypatch.setattr(sys, "argv", ["x", *given, "--rounds", "1", "--output", str(place)])
    captured.main()
    rows = json.loads(place.read_text())["rows"]
    names = ["dense", "keep 0.5", "keep 0.8", *captured.CHOSEN]
    assert [row["model"] for row in rows] == names
    assert rows[-1]["weight_bytes"] < rows[1]["weight_bytes"] < rows[0]["weight_bytes"]
    assert "| 4 bits |" in capsys.readouterr().out
