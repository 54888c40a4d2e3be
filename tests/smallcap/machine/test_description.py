import faiss
import pytest
import torch

from smallcap.machine import description
from smallcap.machine.description import describe_cuda


def test_torch_and_faiss_have_one_cuda_which_is_not_started() -> None:
    found = describe_cuda()
    assert found["torch"] == torch.__version__
    assert list(found["faiss"].values()) == [faiss.__version__]
    assert found["faiss_gpu"] == (found["faiss_cuda"] is not None)
    if found["torch_cuda"] and found["faiss_cuda"]:
        assert found["torch_cuda"].split(".")[0] == found["faiss_cuda"].split(".")[0]
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(
    ("package", "requirement", "runtime"),
    [
        ("faiss-gpu-cuvs", "nvidia-cuda-runtime<14,>=13.2", "nvidia-cuda-runtime"),
        ("faiss-gpu", "nvidia-cuda-runtime-cu12<13,>=12.6", "nvidia-cuda-runtime-cu12"),
        ("faiss-cpu", "numpy>=1.25", None),
    ],
)
def test_faiss_has_the_cuda_that_its_package_requires(
    monkeypatch: pytest.MonkeyPatch, package: str, requirement: str, runtime: str | None
) -> None:
    installed = {package: "1.15.1", "nvidia-cuda-runtime": "13.2.86", "nvidia-cuda-runtime-cu12": "12.9.79"}
    monkeypatch.setattr(
        description, "installed_versions", lambda names: {name: installed[name] for name in names if name in installed}
    )
    monkeypatch.setattr(description, "requires", lambda _: ["packaging", requirement])
    found = describe_cuda()
    assert found["faiss"] == {package: "1.15.1"}
    assert found["faiss_cuda"] == (runtime and installed[runtime])
