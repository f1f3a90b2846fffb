"""A job: what job.toml says, as types; and as the document that its submitter signs.

Reading a file is strict, since a mistyped key that is passed over costs a night of computing: unknown keys,
wrong types and values out of bounds are errors that name the key, and the nearest key that there is.

The document never changes. Its body holds the submitter, the time, the electors, the inputs (by content) and
the spec; the job's id is the body's hash, and the submitter's signature is over it. So whoever passes a job
on can change nothing, and what the electors are cannot be quarrelled about.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mycel.node.jobs.kinds import KINDS, Spec
from mycel.protocol.cid import CID_BYTES, Cid, cid_from
from mycel.protocol.errors import Refused, RemoteProtocolError, UsageProblem
from mycel.protocol.identity import in_domain
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS as LIMITS
from mycel.protocol.mesh import PeerId

VERSION = 1
DOMAIN = "job 1"
ID_CHARS = 32
PeerText = Annotated[str, Meta(min_length=1, max_length=128)]


class JobInvalid(UsageProblem):
    """A job.toml that cannot be submitted as it is; the text names the key and what would do."""


class Blob(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Bytes that are kept as blocks; `root` is the block that lists them."""

    root: Annotated[bytes, Meta(min_length=CID_BYTES, max_length=CID_BYTES)]
    root_bytes: Annotated[int, Meta(ge=1, le=LIMITS.root_bytes)]
    nbytes: Annotated[int, Meta(ge=0, le=LIMITS.blob_bytes)]
    """Of the content."""

    @property
    def cid(self) -> Cid:
        """The root's name. Raises `RemoteProtocolError`."""
        return cid_from(self.root)


class Body(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is signed."""

    version: Annotated[int, Meta(ge=1, le=1)]
    submitter: PeerText
    created: Annotated[int, Meta(ge=0, le=1 << 53)]
    """Milliseconds since 1970."""
    nonce: Annotated[bytes, Meta(min_length=8, max_length=8)]
    """So that the same job can be submitted twice."""
    electors: Annotated[tuple[PeerText, ...], Meta(min_length=1, max_length=LIMITS.electors)]
    kind: Annotated[str, Meta(max_length=32)]
    spec: Annotated[bytes, Meta(max_length=LIMITS.spec_bytes)]
    """The kind's struct as msgpack, keys in order."""
    inputs: Annotated[dict[Annotated[str, Meta(max_length=64)], Blob], Meta(max_length=LIMITS.inputs)]
    """Files that the submitter brought, by key."""


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A job as it stands in documents."""

    body: Annotated[bytes, Meta(max_length=LIMITS.body_bytes)]
    signature: Annotated[bytes, Meta(max_length=64)]
    chain: Annotated[bytes, Meta(max_length=LIMITS.chain_bytes)]
    """Shows that the submitter may submit here."""


class Job(msgspec.Struct, frozen=True):
    """A job, read and checked."""

    id: str
    submitter: PeerId
    created: float
    """Seconds since 1970."""
    electors: tuple[PeerId, ...]
    kind: str
    spec: Spec
    inputs: Mapping[str, Blob]

    @property
    def name(self) -> str:
        """For people."""
        return self.spec.name or self.kind

    @property
    def majority(self) -> int:
        """Electors without whom nobody coordinates."""
        return len(self.electors) // 2 + 1


def read_job_file(path: Path) -> Spec:
    """The spec in a job.toml. Raises `JobInvalid`."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise JobInvalid(f"{path} cannot be read: {error.strerror}; name a job file") from None
    if len(text) > LIMITS.file_bytes:
        raise JobInvalid(f"{path} has {len(text)} bytes; a job file has at most {LIMITS.file_bytes}")
    try:
        content = tomllib.loads(text.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise JobInvalid(f"{path} is no TOML: {error}") from None
    return read_spec(content)


def read_spec(content: Mapping[str, Any]) -> Spec:
    """The spec that a table of keys means. Raises `JobInvalid`."""
    keys = dict(content)
    kind = keys.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        near = "" if not isinstance(kind, str) else _nearest(kind, KINDS)
        said = "there is no kind" if kind is None else f"kind = {kind!r} is none"
        raise JobInvalid(f"{said}: write kind = one of {', '.join(KINDS)}{near}")
    expected = KINDS[kind]
    _check_keys(expected, keys, "")
    try:
        spec = msgspec.convert(keys, expected)
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        raise JobInvalid(_explained(str(error), kind)) from None
    if len(encode_spec(spec)) > LIMITS.spec_bytes:
        raise JobInvalid(f"the job's keys take more than {LIMITS.spec_bytes} bytes; put data into files")
    return spec


def _check_keys(expected: type[msgspec.Struct], table: Mapping[str, Any], where: str) -> None:
    fields = {field.name: field for field in msgspec.structs.fields(expected)}
    for key, value in table.items():
        if key not in fields:
            raise JobInvalid(f"unknown key {where}{key}{_nearest(key, fields)}; keys: {', '.join(fields)}")
        inner = fields[key].type
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct) and isinstance(value, dict):
            _check_keys(inner, value, f"{where}{key}.")
    missing = [name for name, field in fields.items() if field.required and name not in table]
    if missing:
        raise JobInvalid(f"key {where}{missing[0]} is missing; it must be given")


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def _explained(text: str, kind: str) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.sampling.top_k`" with the key in front, and choices as
    such."""
    what, _, where = text.partition(" - at `$")
    what = re.sub(r"Expected `str` matching regex '\^\(([a-z0-9|]+)\)\$'", _choices, what)
    key = where.strip("`.") or "its keys"
    return f"{key}: {what[:1].lower()}{what[1:].replace('`', '')} (job of kind {kind})"


def _choices(found: re.Match[str]) -> str:
    return "expected one of " + ", ".join(found[1].split("|"))


def file_keys(spec: Spec) -> dict[str, str]:
    """Keys of `spec` that name files to take along, with the files' names."""
    found = {}
    for field in msgspec.inspect.type_info(type(spec)).fields:  # type: ignore[attr-defined]
        kinds = field.type.types if isinstance(field.type, msgspec.inspect.UnionType) else (field.type,)
        is_file = any(isinstance(one, msgspec.inspect.Metadata) and _is_titled(one) for one in kinds)
        value = getattr(spec, field.name)
        if is_file and value is not None:
            found[field.name] = value
    return found


def _is_titled(info: msgspec.inspect.Metadata) -> bool:
    return (info.extra_json_schema or {}).get("title") == "file"


def encode_spec(spec: Spec) -> bytes:
    """The spec's one proper encoding."""
    return msgspec.msgpack.encode(spec, order="sorted")


def encode_body(body: Body) -> bytes:
    """The bytes that are signed and hashed."""
    return msgspec.msgpack.encode(body, order="sorted")


def signed_bytes(body: bytes) -> bytes:
    """What the submitter's signature is over."""
    return in_domain(DOMAIN, body)


def id_of(body: bytes) -> str:
    """The job's id: half of the body's sha256, in hex."""
    return hashlib.sha256(body).hexdigest()[:ID_CHARS]


def open_body(data: bytes) -> Job:
    """The job in a body, whoever signed it.

    Raises `Refused` with reason "malformed", "oversized" or "unknown-kind".
    """
    if len(data) > LIMITS.body_bytes:
        raise Refused(f"a job of {len(data)} bytes; at most {LIMITS.body_bytes}", reason="oversized")
    try:
        body = msgspec.msgpack.decode(data, type=Body)
        if encode_body(body) != data:
            raise Refused("the job is not in its one proper encoding", reason="malformed")
        expected = KINDS.get(body.kind)
        if expected is None:
            raise Refused(f"jobs of kind {body.kind!r} are not known here", reason="unknown-kind")
        spec = msgspec.msgpack.decode(body.spec, type=expected)
        for blob in body.inputs.values():
            blob.cid  # noqa: B018 - checked by reading it
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, RemoteProtocolError) as error:
        raise Refused(f"the job cannot be read: {error}", reason="malformed") from None
    electors = tuple(PeerId(elector) for elector in body.electors)
    if len(electors) % 2 == 0 or len(dict.fromkeys(electors)) != len(electors):
        raise Refused("a job names an odd number of electors, each once", reason="malformed")
    if encode_spec(spec) != body.spec or set(file_keys(spec)) != set(body.inputs):
        raise Refused("the job's inputs are not those of its keys", reason="malformed")
    return Job(
        id=id_of(data),
        submitter=PeerId(body.submitter),
        created=body.created / 1000,
        electors=electors,
        kind=body.kind,
        spec=spec,
        inputs=body.inputs,
    )
