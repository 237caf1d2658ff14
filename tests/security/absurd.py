"""Requests that are right, and what can be done to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from honest import SHAPE, TOKENS
from raw_client import RawClient, Refused

from hillinfer_core.errors import by_name
from hillinfer_core.v1 import cold_pool_pb2 as pb

NUMBERS = [0, 1, 2, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]

STRINGS = [
    "",
    "x" * 100_000,
    "../../etc/passwd",
    "a\0b",
    "\x1b[2J",
    " ",
    "'; DROP TABLE record; --",
    "\U0010ffff",
]


def right_requests(client: RawClient, context: int) -> dict[str, list[Message]]:
    """Requests of a session with one context that holds :data:`TOKENS` tokens, by method."""
    region = client.region
    assert client.arena is not None
    client.arena.view(0, (2048,), np.float32)[:] = 1
    client.arena.view(1 << 20, (64,), np.uint32)[:] = 3
    item = pb.Evaluation(
        context_id=context, end_token=TOKENS, k=8, query=region(0, 1024), ids=region(4096, 64)
    )
    for name, at in (("scores", 8192), ("held", 1 << 20), ("rows", 2 << 20)):
        getattr(item, name).CopyFrom(region(at, 64))
    apart = pb.Evaluation(
        context_id=context, end_token=TOKENS, k=8, query=region(0, 1024), ids=region(4096, 128)
    )
    apart.histogram.CopyFrom(region(1 << 20, 4 * 8192))
    apart.scales.CopyFrom(region(8192, 4 * 48))
    rows = region(2 << 20, TOKENS * SHAPE.kv_heads * SHAPE.row_bytes)
    ids = pb.Ids(count_per_head=[3, 5], ids=region(1 << 20, 32))
    keys = pb.KeyRange(end_token=TOKENS, scales=region(0, 512))
    shape = {"layers": 1, "kv_heads": 2, "head_dim": 64, "dtype": 1, "precision": 1}
    return {
        "OpenContext": [
            pb.OpenContextRequest(**shape),
            pb.OpenContextRequest(**shape, durable_name="a", labels={"b": "c"}),
            pb.OpenContextRequest(**shape, base_name="a"),
        ],
        "Append": [
            pb.AppendRequest(
                context_id=context, layer=0, first_token=TOKENS, tokens=64, rows=region(0, 32768)
            ),
            pb.AppendRequest(
                context_id=context, first_token=TOKENS, tokens=3, rows=region(0, 1536), tail=True
            ),
        ],
        "Evaluate": [
            pb.EvaluateRequest(query_heads=4, reduction=1, evaluations=[item]),
            pb.EvaluateRequest(query_heads=4, reduction=2, evaluations=[item, item]),
            pb.EvaluateRequest(query_heads=4, reduction=3, evaluations=[apart]),
        ],
        "Fetch": [
            pb.FetchRequest(context_id=context, by_ids=ids, rows=rows),
            pb.FetchRequest(context_id=context, range=pb.TokenRange(count=TOKENS), rows=rows),
            pb.FetchRequest(context_id=context, keys=keys, rows=rows),
            pb.FetchRequest(context_id=context, tail=pb.Tail(), rows=rows),
        ],
        "SaveContext": [pb.SaveContextRequest(context_id=context)],
        "DeleteContext": [pb.DeleteContextRequest(name="a", uid=0)],
        # Last, as its number may come to be that of the context.
        "CloseContext": [pb.CloseContextRequest(context_id=1 << 40)],
    }


def changes(message: Message) -> Iterator[Callable[[Message], None]]:
    """Everything that sets one field, however deep, to something absurd, or drops it."""
    for field in message.DESCRIPTOR.fields:
        path = field.name
        yield lambda at, path=path: at.ClearField(path)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            yield lambda at, path=path: getattr(at, path).update({text: text for text in STRINGS})
            yield lambda at, path=path: getattr(at, path).update({str(each): "" for each in range(5000)})
        elif field.message_type is not None and field.is_repeated:
            yield lambda at, path=path: getattr(at, path).extend(list(getattr(at, path)) * 300)
            for change in changes(next(iter(getattr(message, path)), field.message_type._concrete_class())):
                yield lambda at, path=path, change=change: change(getattr(at, path)[-1])
        elif field.message_type is not None:
            for change in changes(getattr(message, path)):
                yield lambda at, path=path, change=change: change(getattr(at, path))
        elif field.is_repeated:
            for value in _values(field):
                yield lambda at, path=path, value=value: getattr(at, path).__setitem__(0, value)
            yield lambda at, path=path: getattr(at, path).extend([1] * 100_000)
        else:
            for value in _values(field):
                yield lambda at, path=path, value=value: setattr(at, path, value)


def _values(field: FieldDescriptor) -> list[Any]:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return STRINGS
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return [False, True]
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return [0, 3, 99, (1 << 31) - 1, -1, -(1 << 31)]
    wide = field.cpp_type == FieldDescriptor.CPPTYPE_UINT64
    return [number for number in NUMBERS if wide or number < 1 << 32]


def outcome(client: RawClient, method: str, request: Message) -> str:
    """Make the call; return "done" or the name of the error, whose status must be that of the call."""
    try:
        client.call(method, request)
    except Refused as error:
        refused = error
    else:
        return "done"
    assert refused.error not in ("", "HillInferError"), (method, request, refused)
    assert refused.code is grpc.StatusCode[by_name(refused.error).status]
    return refused.error
