"""Job files and job documents: what is wrong is named, and nothing else is believed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.node.jobs.kinds import GenerateSpec
from mycel.node.jobs.prompts import read_prompts
from mycel.node.jobs.record import open_envelope
from mycel.node.jobs.spec import (
    Blob,
    Body,
    Envelope,
    JobInvalid,
    encode_body,
    encode_spec,
    file_keys,
    id_of,
    open_body,
    read_job_file,
    read_spec,
    signed_bytes,
)
from mycel.protocol.cid import cid_of
from mycel.protocol.errors import Refused
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS as LIMITS
from mycel.protocol.mesh import Access, PeerId

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "jobs"
GENERATE = {"kind": "generate", "model": "m", "prompts": "p.txt"}
BLOB = Blob(cid_of(b"list"), 4, 100)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "generat"}, r"kind = 'generat' is none.*train, federate, generate.*mean generate"),
        ({"kind": None}, "there is no kind"),
        ({"modle": "m"}, r"unknown key modle \(did you mean model\?\)"),
        ({"zzzz": "m"}, "unknown key zzzz; keys: name, model"),
        ({"sampling": {"topk": 1}}, r"unknown key sampling.topk \(did you mean top_k\?\)"),
        ({"sampling": {"top_k": "1"}}, "sampling.top_k: expected int, got str"),
        ({"sampling": 3}, "sampling: expected object, got int"),
        ({"at_once": 10**9}, "at_once: expected int <= 64"),
        ({"model": ""}, "model: expected str of length >= 1"),
        ({"output": "../../etc/passwd"}, "output: expected str matching"),
        ({"model": None}, "model: expected str, got null"),
    ],
)
def test_what_is_wrong_with_a_job_file_is_named_by_its_key_and_the_nearest_one(changes, says):
    content = {**GENERATE, **changes}
    if changes.get("kind", "") is None:
        del content["kind"]
    with pytest.raises(JobInvalid, match=says):
        read_spec(content)


def test_a_missing_key_is_named():
    with pytest.raises(JobInvalid, match="key prompts is missing"):
        read_spec({"kind": "generate", "model": "m"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"kind = ", "no TOML"),
        (b"\xff", "no TOML"),
        (b"#" * (LIMITS.file_bytes + 1), "at most"),
        (
            b'kind = "federate"\napp = "digits"\ndata = "d"\n[settings]\nlr = [1]',
            r"settings\[...\]: expected",
        ),
        (
            b'kind = "train"\napp = "a"\n[settings]\n'
            + b"".join(b'k%d = "%s"\n' % (n, b"x" * 900) for n in range(9)),
            "more than 4096 bytes",
        ),
    ],
)
def test_a_file_that_is_no_job_is_refused(tmp_path, text, says):
    path = tmp_path / "job.toml"
    path.write_bytes(text)
    with pytest.raises(JobInvalid, match=says):
        read_job_file(path)
    with pytest.raises(JobInvalid, match="cannot be read"):
        read_job_file(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("quorum", "most", r"quorum: expected one of majority, any \(job of kind train\)"),
        ("quorum", 3, "quorum: expected str, got int"),
        ("codec", "fp8", "codec: expected one of none, int8, int4"),
        ("overlap", "yes", "overlap: expected bool, got str"),
        ("overlaps", True, r"unknown key overlaps \(did you mean overlap\?\)"),
    ],
)
def test_what_a_train_job_may_say_is_listed_where_it_says_something_else(key, value, says):
    with pytest.raises(JobInvalid, match=says):
        read_spec({"kind": "train", "app": "lm", key: value})


def test_keys_that_name_files_are_known_by_their_type():
    assert file_keys(read_spec(GENERATE)) == {"prompts": "p.txt"}
    assert file_keys(read_spec({"kind": "train", "app": "lm"})) == {}
    train = read_spec({"kind": "train", "app": "lm", "data": "text.txt", "model": "m.safetensors"})
    assert file_keys(train) == {"data": "text.txt", "model": "m.safetensors"}


def body(**changes: object) -> Body:
    fields = {
        "version": 1, "submitter": "s", "created": 5000, "nonce": b"12345678", "electors": ("a", "b", "c"),
        "kind": "generate", "spec": encode_spec(read_spec(GENERATE)), "inputs": {"prompts": BLOB},
    }  # fmt: skip
    return Body(**{**fields, **changes})


def sign(data: bytes, by: str = "s") -> bytes:
    return f"{by} signs ".encode()[:8] + id_of(signed_bytes(data)).encode()


def verify(peer: PeerId, data: bytes, signature: bytes) -> bool:
    return signature == f"{peer} signs ".encode()[:8] + id_of(data).encode()


def access_of(peer: PeerId, chain: bytes) -> Access:
    return Access.SUBMIT if chain == b"a chain" else Access.STRANGER


def test_a_job_is_what_its_submitter_signed():
    data = encode_body(body())
    job = open_envelope(Envelope(data, sign(data), b"a chain"), access_of, verify)
    assert (job.id, job.submitter, job.electors, job.majority) == (id_of(data), "s", ("a", "b", "c"), 2)
    assert (job.created, job.name, job.spec) == (5.0, "generate", read_spec(GENERATE))
    again = encode_body(body(nonce=b"87654321"))
    assert id_of(again) != job.id


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"electors": ("a", "b")}, "malformed"),
        ({"electors": ("a", "a", "b")}, "malformed"),
        ({"electors": ()}, "malformed"),
        ({"electors": tuple("abcdefg")}, "malformed"),
        ({"kind": "mine-coins"}, "unknown-kind"),
        ({"spec": msgspec.msgpack.encode({"model": "m", "prompts": "p", "rm": "-rf"})}, "malformed"),
        ({"spec": msgspec.msgpack.encode({"model": 3, "prompts": "p"})}, "malformed"),
        ({"spec": encode_spec(read_spec(GENERATE)) + b"x"}, "malformed"),
        ({"spec": b"\x91" * 4000}, "malformed"),
        ({"inputs": {}}, "malformed"),
        ({"inputs": {"prompts": BLOB, "more": BLOB}}, "malformed"),
        ({"inputs": {"prompts": Blob(b"x" * 36, 4, 100)}}, "malformed"),
        ({"inputs": {"prompts": Blob(cid_of(b""), 4, 1 << 60)}}, "malformed"),
        ({"version": 2}, "malformed"),
        ({"spec": b"x" * (LIMITS.body_bytes + 1)}, "oversized"),
    ],
)
def test_a_job_document_that_is_not_as_it_should_be_is_refused_by_a_word(changes, reason):
    data = msgspec.msgpack.encode(body(**changes), order="sorted")
    with pytest.raises(Refused) as refused:
        open_envelope(Envelope(data, sign(data), b"a chain"), access_of, verify)
    assert refused.value.reason == reason


def test_a_forged_submitter_and_a_stranger_are_refused():
    data = encode_body(body())
    for envelope, reason in (
        (Envelope(data, sign(data, "m"), b"a chain"), "forged"),
        (Envelope(data, sign(data), b"no chain"), "foreign"),
        (Envelope(encode_body(body(submitter="t")), sign(data), b"a chain"), "forged"),
    ):
        with pytest.raises(Refused) as refused:
            open_envelope(envelope, access_of, verify)
        assert refused.value.reason == reason


@given(at=st.integers(0, 300), byte=st.integers(0, 255), cut=st.integers(0, 300))
def test_bytes_of_a_job_that_are_changed_or_cut_are_refused_or_are_another_job(at, byte, cut):
    data = bytearray(encode_body(body()))
    name = id_of(bytes(data))
    data[at % len(data)] = byte
    changed = bytes(data[: len(data) - cut % 3])
    try:
        job = open_body(changed)
    except Refused as refused:
        reason = refused.reason
    else:
        reason = "malformed"
        assert (job.id == name) == (changed == encode_body(body()))
    assert reason in ("malformed", "oversized", "unknown-kind")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_examples_are_jobs_whose_files_are_there(path):
    assert all((EXAMPLES / name).is_file() for name in file_keys(read_job_file(path)).values())


def test_the_example_is_a_job_with_prompts():
    spec = read_job_file(EXAMPLES / "generate.toml")
    assert isinstance(spec, GenerateSpec)
    prompts = read_prompts(spec, (EXAMPLES / file_keys(spec)["prompts"]).read_bytes())
    assert [prompt.rest.get("id") for prompt in prompts] == ["pond", "snow", None, None, "moss"]
