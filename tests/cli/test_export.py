"""`firp export` and `firp push`."""

import json
import shutil
from types import SimpleNamespace

import firp
import pytest
import torch
from firp.cli import export as export_command
from firp.integrations import push as push_module
from transformers import AutoModelForCausalLM

from firp_kernels import __version__


@pytest.fixture
def exported(cli, folder, tmp_path):
    """A predictor with a profile and leftovers of its training beside it, and the folder exported from it."""
    shutil.copytree(folder / "predictor", tmp_path / "predictor")
    for name in ("acceptance.npz", "checkpoint.pt", "log.jsonl"):
        (tmp_path / "predictor" / name).write_bytes(b"not looked at")
    code, out, err = cli("export", tmp_path / "out", "--to", "custom-generate", "--predictor", tmp_path / "predictor")
    assert (code, err) == (0, "") and str(tmp_path / "out") in out.replace("\n", "")
    return tmp_path / "out"


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


PREDICTOR = ["README.md", "acceptance.npz", "config.json", "model.safetensors"]


def test_an_exported_folder_holds_all_that_decoding_needs(exported, folder):
    held = [f"custom_generate/{name}" for name in (*PREDICTOR, "generate.py", "requirements.txt")]
    assert files(exported) == sorted(["README.md", *held])
    for name in PREDICTOR[1:]:
        own = exported.parent / "predictor" / name
        assert (exported / "custom_generate" / name).read_bytes() == own.read_bytes()
    assert (exported / "custom_generate/requirements.txt").read_text() == f"firp_kernels>={__version__}\n"
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- custom_generate\n") and "{" not in card
    (exported / "custom_generate/acceptance.npz").unlink()
    model, ids = AutoModelForCausalLM.from_pretrained(folder / "model"), torch.tensor([[5, 6, 7]])
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    out = model.generate(ids, max_new_tokens=8, do_sample=False, custom_generate=str(exported), trust_remote_code=True)
    assert torch.equal(out, plain)


def test_the_card_names_a_base_model_of_the_hub(tmp_path, cli):
    code, _, _ = cli("export", tmp_path / "out", "--to", "custom-generate", "--predictor", "smollm2-135m")
    card = (tmp_path / "out/README.md").read_text()
    base = json.loads((tmp_path / "out/custom_generate/config.json").read_text())["base_model"]
    assert code == 0 and f"\nbase_model: {base}\n" in card and f'from_pretrained("{base}")' in card


@pytest.mark.parametrize("name", ['x"); print("', "two\nlines", "{name}", "a b", "owner/name/more"])
def test_the_card_holds_no_other_text_for_a_base_model(cli, folder, tmp_path, name):
    shutil.copytree(folder / "predictor", tmp_path / "predictor")
    config = json.loads((tmp_path / "predictor/config.json").read_text())
    (tmp_path / "predictor/config.json").write_text(json.dumps(config | {"base_model": name}))
    assert cli("export", tmp_path / "out", "--to", "custom-generate", "--predictor", tmp_path / "predictor")[0] == 0
    card = (tmp_path / "out/README.md").read_text()
    assert name not in card and 'from_pretrained("the base model")' in card and "base_model:" not in card


def test_a_model_that_the_predictor_fits_is_accepted(cli, folder, tmp_path):
    given = "--to", "custom-generate", "--predictor", folder / "predictor", "--model", folder / "model"
    (tmp_path / "out").mkdir()  # empty
    assert cli("export", tmp_path / "out", *given)[0] == 0


def test_a_checkpoint_for_vllm_is_the_models_configuration_and_the_predictor(cli, folder, tmp_path):
    given = "--to", "vllm", "--predictor", folder / "predictor", "--model", folder / "model"
    assert cli("export", tmp_path / "out", *given)[0] == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    base = json.loads((folder / "model/config.json").read_text())
    layer = json.loads((folder / "predictor/config.json").read_text())["insertion_layer"]
    assert config["hidden_size"] == base["hidden_size"] and config["eagle_aux_hidden_state_layer_ids"] == [layer]
    assert firp.load_predictor(tmp_path / "out/predictor").insertion_layer == layer
    code, out, _ = cli("push", tmp_path / "out", "me/it", "--dry-run")
    assert code == 0 and "  config.json" in out and "  predictor/model.safetensors" in out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"to": "onnx"}, "to: got 'onnx', expected custom-generate or vllm"),
        ({"to": "vllm"}, "model: got none, expected the base model: vLLM's configuration is made from its own"),
        ({"output": "full"}, "full is not empty, expected a folder that is not there yet"),
        ({"output": "file"}, "file is a file, expected a folder that is not there yet"),
        ({"output": "link"}, "link is a link to nowhere, expected a folder that is not there yet"),
        ({"output": "file/out"}, "file is a file, expected a folder"),
        ({"predictor": None}, "predictor: got none, expected a folder or hub id, or --model with a shipped one"),
        ({"predictor": "./nowhere"}, "predictor: got './nowhere', expected an existing folder or a hub id"),
        ({"model": "other"}, "predictor: vocab_size differs: the predictor was trained for 32"),
        ({"model": "./nowhere"}, "model: got './nowhere', expected an existing folder"),
        ({"model": "smollm3", "predictor": None}, "model: got 'smollm3', expected a folder, a hub id"),
    ],
)  # fmt: skip
def test_a_bad_export_is_one_error_and_writes_nothing(cli, folder, tmp_path, change, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    config = json.loads((folder / "model/config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"vocab_size": 33}))
    given = {"to": "custom-generate", "output": "out", "predictor": folder / "predictor", "model": None} | change
    model = tmp_path / "other" if given["model"] == "other" else given["model"]
    options = [f"--{name}={value}" for name, value in (("predictor", given["predictor"]), ("model", model)) if value]
    before = files(tmp_path)
    code, out, err = cli("export", tmp_path / given["output"], "--to", given["to"], *options)
    assert code == 2 and out == "" and err.startswith("error: ") and message in err.replace("\n", "")
    assert files(tmp_path) == before and not (tmp_path / "out").exists()


class FakeApi:
    """The Hub as `firp push` sees it."""

    def __init__(self, there=(), fault=None):
        self.there, self.fault, self.calls = there, fault, []

    def create_repo(self, repo, **options):
        if self.fault:
            raise self.fault
        self.calls.append(("create_repo", repo, options))

    def file_exists(self, repo, name):
        return name in self.there

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options))
        return SimpleNamespace(commit_url="https://huggingface.co/me/it/commit/1")


@pytest.fixture
def hub(monkeypatch):
    """Set the Hub and the token that a command finds."""

    def use(api, token="secret"):
        monkeypatch.setattr(push_module, "HfApi", lambda: api)
        monkeypatch.setattr(export_command, "get_token", lambda: token)
        return api

    return use


@pytest.mark.parametrize("options, token", [((), None), (("--dry-run",), "secret")])
def test_a_dry_run_says_what_would_go_where(cli, exported, hub, options, token):
    api = hub(FakeApi(fault=AssertionError("nothing is asked of the Hub")), token)
    code, out, err = cli("push", exported, "me/it", *options)
    named = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert (code, err) == (0, "") and sorted(named) == files(exported) and api.calls == []
    assert "https://huggingface.co/me/it" in out and "nothing was uploaded: this" in out
    assert ("no token" in out) == (token is None) and "secret" not in out


@pytest.mark.parametrize("there", [(), ("README.md",)])
def test_an_exported_folder_is_uploaded_in_one_commit(cli, exported, hub, there):
    api = hub(FakeApi(there))
    (exported / "custom_generate/notes.txt").touch()
    code, out, _ = cli("push", exported, "me/it", "--private")
    assert code == 0 and "uploaded: https://huggingface.co/me/it/commit/1" in out
    created, uploaded = api.calls
    assert created == ("create_repo", "me/it", {"private": True, "exist_ok": True})
    kept = [name for name in files(exported) if name != "custom_generate/notes.txt" and name not in there]
    assert sorted(uploaded[1]["allow_patterns"]) == kept
    assert uploaded[1]["folder_path"] == exported and uploaded[1]["repo_id"] == "me/it"


def test_of_a_predictor_its_own_files_are_uploaded(cli, exported, hub):
    (exported.parent / "predictor/acceptance.npz").unlink()
    api = hub(FakeApi())
    assert cli("push", exported.parent / "predictor", "me/it")[0] == 0
    assert sorted(api.calls[1][1]["allow_patterns"]) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "source, repo, message",
    [
        ("nowhere", "me/it", "expected an existing folder"),
        ("out", "it", "repo: got 'it', expected owner/name"),
        ("out", "me/it/more", "repo: got 'me/it/more', expected owner/name"),
        ("out", "me/a b", "repo: got 'me/a b', expected owner/name: "),
        (".", "me/it", "has no config.json that can be read"),
        ("damaged", "me/it", "model.safetensors: cannot be read as safetensors"),
    ],
)
def test_a_bad_push_is_one_error(cli, exported, hub, source, repo, message):
    hub(FakeApi(fault=AssertionError("nothing is asked of the Hub")))
    shutil.copytree(exported, exported.parent / "damaged")
    (exported.parent / "damaged/custom_generate/model.safetensors").write_bytes(b"cut off")
    code, out, err = cli("push", exported.parent / source, repo)
    assert code == 2 and out == "" and message in err.replace("\n", "")


def test_what_the_hub_refuses_is_one_error(cli, exported, hub):
    hub(FakeApi(fault=RuntimeError("403 Forbidden:\nno rights")))
    code, _, err = cli("push", exported, "me/it")
    assert code == 2 and "repo: cannot write to 'me/it' on the Hub: 403 Forbidden: no rights" in err


def test_an_exported_predictor_is_loaded_like_any_other(exported, folder):
    original = firp.load_predictor(folder / "predictor")
    assert firp.load_predictor(exported / "custom_generate").fingerprint() == original.fingerprint()
