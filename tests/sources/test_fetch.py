"""Downloads that break, resume, lie; hubs that are away, gated or lack what is asked: over real local connections."""

import errno
import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import pytest

from llmdrop_utils import LLMDropError, NotAvailable
from llmdrop_utils.sources import fetch as sources
from llmdrop_utils.sources import registries
from llmdrop_utils.sources.catalogue import catalogue

URL = "/files/demo.whl"
TEXT = b"some text\n" * 50_000


@pytest.fixture
def package(network, cache, monkeypatch):
    """A wheel on the stand-in, and the entry of data/sources.yaml that pins it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("demo/data/a.txt", TEXT)
        wheel.writestr("demo/data/b.txt", b"b")
        wheel.writestr("demo/__init__.py", "raise SystemExit('executed!')")
    network.files[URL] = buffer.getvalue()
    monkeypatch.setattr(sources, "address_of", lambda package: network.address + URL)
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    return {"name": "demo", "version": "1.0", "sha256": sha256, "files": ["demo/data/a.txt"]}


def test_fetch_unpacks_only_what_is_named(package, cache, network):
    (path,) = sources.fetch_package_files([package])
    assert path.read_bytes() == TEXT
    assert not list(cache.rglob("__init__.py"))
    assert not list(cache.rglob("*.whl*"))
    sources.fetch_package_files([package])
    assert len(network.requests) == 1, "a second fetch needs no network"


def test_wildcards_and_more_files_later(package):
    sources.fetch_package_files([package])
    package["files"] = ["demo/data/*.txt"]
    assert [p.name for p in sources.fetch_package_files([package])] == ["a.txt", "b.txt"]
    package["files"] = ["demo/none.txt"]
    with pytest.raises(LLMDropError, match=r"holds no file 'demo/none.txt'"):
        sources.fetch_package_files([package])


def test_download_resumes_where_it_broke(package, network):
    network.cut_after = 200_000
    (path,) = sources.fetch_package_files([package])  # 500 kB in pieces of less than 200 kB
    assert path.read_bytes() == TEXT
    kept = 200_000 // sources.CHUNK * sources.CHUNK
    assert [r[2] for r in network.requests] == [None, f"bytes={kept}-", f"bytes={2 * kept}-"]


def test_truncated_download_is_kept_and_continued(package, network):
    network.cut_after = 70_000
    with pytest.raises(NotAvailable, match=r"the connection broke 4 times .* 262,144 bytes are kept: run the same command"):
        sources.fetch_package_files([package])
    network.cut_after, network.requests = None, []
    (path,) = sources.fetch_package_files([package])
    assert path.read_bytes() == TEXT
    assert [r[2] for r in network.requests] == ["bytes=262144-"]


def test_altered_download_is_refused(package, network, cache):
    network.files[URL] = network.files[URL].replace(b"some text", b"evil text", 1)
    with pytest.raises(LLMDropError, match=f"expected sha256 {package['sha256']}, got .*It was deleted and nothing was used"):
        sources.fetch_package_files([package])
    assert not [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_index_away(package, network):
    network.down = True
    with pytest.raises(NotAvailable, match=r"Could not download demo-1.0: the connection broke 4 times \(ConnectionError\)"):
        sources.fetch_package_files([package])


def test_package_that_the_index_lacks(cache, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    package = {"name": "demo", "version": "1.0", "sha256": "0" * 64, "files": ["x"]}
    with pytest.raises(NotAvailable, match=r"did not offer demo==1.0: .*Check the network"):
        sources.fetch_package_files([package])


@pytest.mark.parametrize("lie", [False, True])
def test_what_only_pip_can_reach(cache, tmp_path, monkeypatch, lie):
    """A folder of release files, known to pip's settings alone: pip brings the file, and it is verified like any other."""
    wheel = tmp_path / "links" / "demo_pkg-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("demo_pkg/a.txt", b"a")
        archive.writestr("demo_pkg-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo-pkg\nVersion: 1.0\n")
        archive.writestr("demo_pkg-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("demo_pkg-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a notebook's kernel
    sha256 = "0" * 64 if lie else sources.file_sha256(wheel)
    package = {"name": "demo-pkg", "version": "1.0", "sha256": sha256, "files": ["demo_pkg/a.txt"]}
    if lie:
        with pytest.raises(LLMDropError, match="demo-pkg-1.0 is not the pinned file"):
            sources.fetch_package_files([package])
        assert not list(cache.rglob("*.whl"))
    else:
        assert sources.fetch_package_files([package])[0].read_bytes() == b"a"


def test_unsafe_names_are_refused(package, network):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("../../evil.txt", b"x")
    network.files[URL] = buffer.getvalue()
    package |= {"sha256": hashlib.sha256(buffer.getvalue()).hexdigest(), "files": ["*evil.txt"]}
    with pytest.raises(LLMDropError, match="unsafe file name"):
        sources.fetch_package_files([package])


# ---- packages of npm ----------------------------------------------------------------------------------------------------


def tar(**members):
    """A tarball as npm has it, gzipped."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tarball:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tarball.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def tarball(network, cache, monkeypatch):
    """A package on the stand-in, which speaks npm's protocol, and the entry of data/sources.yaml that pins it."""
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", network.address)
    monkeypatch.setenv("NPM_CONFIG_CACHE", str(cache / "npm"))
    monkeypatch.setenv("NPM_CONFIG_FETCH_RETRIES", "0")
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)

    def publish(content, **more):
        network.files["/files/demo.tgz"] = content
        dist = {"tarball": f"{network.address}/files/demo.tgz", "shasum": hashlib.sha1(content).hexdigest()}
        versions = {"1.0.0": {"name": "demo", "version": "1.0.0", "dist": dist}}
        listing = {"name": "demo", "dist-tags": {"latest": "1.0.0"}, "versions": versions}
        network.files["/demo"] = json.dumps(listing).encode()
        sha256 = hashlib.sha256(content).hexdigest()
        return {"name": "demo", "registry": "npm", "version": "1.0.0", "sha256": sha256, "files": ["package/model.part"]} | more

    return publish


NPM = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")


@NPM
def test_npm_names_the_address(tarball, network, cache):
    """It is asked for the address; the file comes as any other, in pieces, and nothing else is unpacked."""
    package = tarball(tar(**{"package/model.part": TEXT, "package/install.js": b"process.exit(1)"}))
    network.cut_after = 300
    network.files["/files/demo.tgz"] = content = network.files["/files/demo.tgz"]
    assert len(content) > 600
    with mock.patch.object(sources, "CHUNK", 100):
        (path,) = sources.fetch_package_files([package])
    assert path.read_bytes() == TEXT
    assert [r[2] for r in network.requests if r[1] == "/files/demo.tgz"][:2] == [None, "bytes=300-"]
    assert not list(cache.rglob("install.js"))
    assert not list(cache.rglob("*.tgz"))


@NPM
def test_what_only_npm_can_reach(tarball, network, monkeypatch):
    package = tarball(tar(**{"package/model.part": b"x"}))
    monkeypatch.setattr(sources, "address_of", lambda package: f"{network.address}/files/away.tgz")
    assert sources.fetch_package_files([package])[0].read_bytes() == b"x"


@NPM
def test_a_package_that_npm_does_not_know(tarball):
    package = tarball(tar(**{"package/model.part": b"x"}), version="2.0.0")
    with pytest.raises(
        NotAvailable, match=r"The npm registry did not offer demo@2.0.0: .*404.*`npm view demo@2.0.0` must work"
    ):
        sources.fetch_package_files([package])


@NPM
def test_altered_and_truncated_tarballs(tarball, network, cache):
    package = tarball(content := tar(**{"package/model.part": TEXT}))
    for wrong in (content[:-20], content[:200] + b"?" + content[201:]):
        network.files["/files/demo.tgz"] = wrong
        with pytest.raises(LLMDropError, match="demo-1.0.0 is not the pinned file"):
            sources.fetch_package_files([package])
        assert not list(cache.rglob("*.part"))


@pytest.mark.parametrize("content", [b"no tarball at all", tar(**{"package/model.part": TEXT})[:200]])
def test_pinned_but_no_tarball(tarball, network, monkeypatch, content):
    package = tarball(content)
    monkeypatch.setattr(sources, "address_of", lambda package: f"{network.address}/files/demo.tgz")
    with pytest.raises(LLMDropError, match=r"demo-1.0.0 is no package: .*Correct its sha256 in data/sources.yaml"):
        sources.fetch_package_files([package])


def test_without_npm(tarball, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        NotAvailable, match=r"for which npm is needed, and npm was not found. Install Node.js, or put .*archive.tgz"
    ):
        sources.fetch_package_files([tarball(tar(**{"package/model.part": b"x"}))])


@pytest.mark.parametrize("name", ["../../evil.txt", "/evil.txt"])
def test_unsafe_names_in_a_tarball(tarball, network, monkeypatch, name):
    monkeypatch.setattr(sources, "address_of", lambda package: f"{network.address}/files/demo.tgz")
    with pytest.raises(LLMDropError, match="unsafe file name"):
        sources.fetch_package_files([tarball(tar(**{name: b"x"}), files=["*evil.txt"])])


# ---- the disk -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["download", "unpack"])
def test_full_disk(package, monkeypatch, what, cache):
    """Simulated: the write that would fill the disk fails as the system would make it fail."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if what == "download":
        monkeypatch.setattr(sources, "_download_rest", full)
    else:
        monkeypatch.setattr(sources.shutil, "copyfileobj", full)
    with pytest.raises(LLMDropError, match=r"The disk is full: could not write .*Nothing stored before is lost"):
        sources.fetch_package_files([package])
    assert not list(cache.rglob("a.txt"))
    monkeypatch.undo()


def test_hub_files(network):
    network.repositories["datasets/org/corpus"] = {"c" * 40: {"a.jsonl": b"{}", "b.jsonl": b"{}", "script.py": b"1/0"}}
    folder = sources.fetch_hub("org/corpus", "c" * 40, ["a.jsonl"])
    assert [p.name for p in folder.iterdir()] == ["a.jsonl"]
    assert folder.name == "c" * 40


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda net: net.gated.add("org/model"), NotAvailable, "gated: accept its licence at http.*/org/model and set HF_"),
        (lambda net: setattr(net, "down", True), NotAvailable, "hub could not be reached .*smollm2-135m"),
        (lambda net: net.repositories.clear(), LLMDropError, "hub has no model 'org/model' that you may read"),
        (lambda net: net.repositories["org/model"].clear(), LLMDropError, "not the revision 'd"),
    ],
)  # fmt: skip
def test_hub_errors(network, change, error, message):
    network.repositories["org/model"] = {"d" * 40: {"config.json": b"{}", "model.safetensors": b""}}
    change(network)
    with pytest.raises(error, match=message):
        sources.fetch_hub("org/model", "d" * 40)


def test_every_source_is_pinned():
    everything = [*catalogue()["models"].values(), *catalogue()["corpora"].values()]
    for source in everything:
        assert source["licence"]
        assert len({"hub", "packages", "generated"} & set(source)) == 1
        if "hub" in source:
            assert len(source["revision"]) == 40
            int(source["revision"], 16)
        for package in source.get("packages", []):
            assert len(package["sha256"]) == 64
            assert package["version"]


def test_remembered_hash_follows_changes(cache, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    first = sources.remembered_sha256(file)
    assert first == hashlib.sha256(b"1").hexdigest()
    assert "weights" in Path(cache / "hashes.json").read_text()
    file.write_bytes(b"22")
    assert sources.remembered_sha256(file) == hashlib.sha256(b"22").hexdigest()


def test_which_wheel_is_pinned(monkeypatch):
    """Of a package with a wheel for each kind of machine, pip is asked for the same one on all of them."""
    asked = []
    monkeypatch.setattr(
        registries, "_run", lambda command, *_: asked.append(command) or '{"install": [{"download_info": {"url": ""}}]}'
    )
    package = {"name": "demo", "version": "1.0", "sha256": "0" * 64, "files": ["x"]}
    registries.address_of(package | {"wheel": {"platform": "any_one", "python-version": "3.11"}})
    assert asked[0][-5:] == ["--platform", "any_one", "--python-version", "3.11", "demo==1.0"]
    registries.address_of(package)
    assert "--platform" not in asked[1]
