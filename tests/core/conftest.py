import pytest

from hillinfer_core import kernel


@pytest.fixture(params=["portable", "avx2", "avx512vnni"])
def variant(request, monkeypatch):
    if request.param not in kernel.variants():
        pytest.skip(f"this processor lacks {request.param}")
    monkeypatch.setenv("HILLINFER_KERNEL", request.param)
    return request.param
