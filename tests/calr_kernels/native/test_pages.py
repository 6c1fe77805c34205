"""Memory in huge pages: tensors of their own, and given back."""

import gc
import threading

from calr_kernels.native import pages


def test_tensors_do_not_overlap_and_are_aligned():
    made = [pages.empty(size).fill_(i) for i, size in enumerate((1, 63, 64, 65, 0, 5000, 1 << 20))]
    assert [tensor.numel() for tensor in made] == [1, 63, 64, 65, 0, 5000, 1 << 20]
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(made))
    assert all(tensor.data_ptr() % pages.ALIGNED == 0 for tensor in made if tensor.numel())


def test_a_region_is_not_written_beyond():
    sizes = [pages.REGION // 2, pages.REGION // 2, pages.REGION // 3, pages.REGION + 1]
    made = [pages.empty(size) for size in sizes]
    for i, tensor in enumerate(made):
        tensor[:1], tensor[-1:] = i, i
    assert [(int(t[0]), int(t[-1])) for t in made] == [(i, i) for i in range(len(sizes))]


def test_threads_get_parts_of_their_own():
    made = {}

    def fill(name):
        made[name] = [pages.empty(4096).fill_(name) for _ in range(200)]

    threads = [threading.Thread(target=fill, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(bool((part == name).all()) for name, parts in made.items() for part in parts)


def test_memory_goes_with_the_last_tensor():
    made = [pages.empty(pages.REGION // 2) for _ in range(2)]  # the second in a region of theirs
    region = pages._last[0]
    assert region() is not None
    del made
    gc.collect()
    assert region() is None
