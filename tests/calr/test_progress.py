"""What phases take, as it is measured."""

import threading
import time
from types import SimpleNamespace

import psutil
import torch

from calr.progress import begin_phase, measured_phases, progress


def test_a_phase_lasts_until_the_next_begins_and_is_added_to_when_it_comes_again():
    with measured_phases("loading") as found:
        time.sleep(0.02)
        for _ in progress(range(2), desc="first", unit="step"):
            time.sleep(0.02)
        for _ in progress(range(1), desc="other", unit="step"):
            time.sleep(0.01)
        time.sleep(0.03)  # what comes behind a loop is its own still
        for _ in progress(range(1), desc="shown", unit="step", phase="first"):
            time.sleep(0.02)
    assert list(found) == ["loading", "first", "other"]
    for name, least in {"loading": 0.02, "first": 0.06, "other": 0.04}.items():
        assert least <= found[name].seconds < least + 1
    for _ in progress(range(1), desc="later", unit="step"):
        pass
    assert "later" not in found


def test_the_peak_is_that_of_the_phase():
    with measured_phases("loading") as found:
        for _ in progress(range(1), desc="large", unit="step"):
            torch.ones(75_000_000).exp_()  # 300 MB for a while
        for _ in progress(range(1), desc="small", unit="step"):
            pass
    assert found["large"].peak_bytes - found["small"].peak_bytes > 250e6
    assert 50e6 < found["small"].peak_bytes < 20e9


def test_a_look_that_ends_in_the_next_phase_is_not_counted_there(monkeypatch):
    looking, go_on = threading.Event(), threading.Event()

    def memory_info():
        if threading.current_thread() is threading.main_thread() or go_on.is_set():
            return SimpleNamespace(rss=1)
        looking.set()
        go_on.wait(10)
        return SimpleNamespace(rss=10**15)

    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=memory_info))
    with measured_phases("large") as found:
        assert looking.wait(10)
        begin_phase("small")
        go_on.set()
    assert found["small"].peak_bytes < 10**15


def test_what_a_gpu_holds_is_counted_where_there_is_one(device):
    with measured_phases("loading") as found:
        for _ in progress(range(1), desc="large", unit="step"):
            torch.ones(25_000_000, device=device).exp_()
    on_gpu = found["large"].gpu_bytes
    assert on_gpu >= 100e6 if device.type == "cuda" else on_gpu == 0
