"""Protobuf messages of streams and heartbeats to our values and back; the other half of convert.

The columns of an up-message are the hot path: one message per engine step with all its requests.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm_py.base.hashing import HASH_BYTES
from xllm_py.base.logprob import TokenLogprob
from xllm_py.cluster.duties import Duty
from xllm_py.cluster.instance_info import Role
from xllm_py.cluster.load import Load, Progress
from xllm_py.cluster.prefix_index import MOST_TOLD, CacheNews
from xllm_py.control.bounds import (
    MAX_ENTRIES,
    MAX_IDS,
    MAX_MOMENTS,
    MAX_TEXT,
    MAX_TOP,
    check,
    column,
    label,
    labels,
    sparse,
)
from xllm_py.control.pb import xllm_pb2 as pb
from xllm_py.core.plan import Outputs
from xllm_py.wire import control_messages as cm
from xllm_py.wire.messages import Verdicts


def from_up(up: cm.GenerationsUp) -> pb.GenerationsUp:
    """To protobuf."""
    outputs, verdicts = up.outputs, up.verdicts
    reasons = {entry: reason for entry, reason in enumerate(outputs.finish_reasons) if reason}
    journeys = {entry: pb.Journey(moments=at) for entry, at in outputs.journeys.items()}
    return pb.GenerationsUp(
        name=up.name,
        incarnation=up.incarnation,
        sequence=up.sequence,
        outputs=pb.Outputs(
            step=outputs.step,
            request_ids=outputs.request_ids,
            attempts=outputs.attempts,
            choices=outputs.choices,
            positions=outputs.positions,
            token_ids=outputs.token_ids,
            finish_reasons=reasons,
            messages=outputs.messages,
            cached_tokens=outputs.cached_tokens,
            journeys=journeys,
            scored=list(outputs.logprobs),
            logprobs=_from_logprobs(outputs.logprobs.values()),
            prompt_logprobs={
                entry: _from_logprobs(each) for entry, each in outputs.prompt_logprobs.items()
            },
        ),
        verdicts=pb.Verdicts(
            request_ids=verdicts.request_ids,
            attempts=verdicts.attempts,
            kinds=verdicts.kinds,
            reasons=verdicts.reasons,
            num_bytes=verdicts.num_bytes,
            seconds=verdicts.seconds,
            exposed=verdicts.exposed,
        ),
    )


def to_up(message: pb.GenerationsUp) -> cm.GenerationsUp:
    """From protobuf."""
    return cm.GenerationsUp(
        name=label(message.name),
        incarnation=label(message.incarnation),
        sequence=message.sequence,
        outputs=_to_outputs(message.outputs),
        verdicts=_to_verdicts(message.verdicts),
    )


def _to_outputs(message: pb.Outputs) -> Outputs:
    request_ids = labels(message.request_ids)
    length = len(request_ids)
    finish_reasons = [""] * length
    for entry, reason in sparse(message.finish_reasons, length, "finish_reasons").items():
        finish_reasons[entry] = label(reason)
    messages = sparse(message.messages, length, "messages")
    journeys = sparse(message.journeys, length, "journeys")
    logprobs = _to_logprobs(message.logprobs)
    check(len(logprobs) == len(message.scored), "logprobs of other entries")
    scored = dict(zip(message.scored, logprobs, strict=True))
    prompts = sparse(message.prompt_logprobs, length, "prompt_logprobs")
    return Outputs(
        step=message.step,
        request_ids=request_ids,
        attempts=column(message.attempts, length, "attempts"),
        choices=column(message.choices, length, "choices"),
        positions=column(message.positions, length, "positions"),
        token_ids=column(message.token_ids, length, "token_ids"),
        finish_reasons=finish_reasons,
        messages={entry: text[:MAX_TEXT] for entry, text in messages.items()},
        cached_tokens=sparse(message.cached_tokens, length, "cached_tokens"),
        journeys={entry: _to_moments(journey) for entry, journey in journeys.items()},
        logprobs=sparse(scored, length, "logprobs"),
        prompt_logprobs={entry: _to_logprobs(each) for entry, each in prompts.items()},
    )


def _from_logprobs(rows: Iterable[TokenLogprob]) -> pb.Logprobs:
    message = pb.Logprobs()
    for row in rows:
        message.logprobs.append(row.logprob)
        message.num_top.append(len(row.top_ids))
        message.top_ids.extend(row.top_ids)
        message.top_logprobs.extend(row.top_logprobs)
    return message


def _to_logprobs(message: pb.Logprobs) -> list[TokenLogprob]:
    length = len(message.logprobs)
    check(length <= MAX_IDS, f"logprobs of {length} tokens")
    counts = column(message.num_top, length, "num_top")
    check(all(count <= MAX_TOP for count in counts), "too many likely tokens")
    ids = column(message.top_ids, sum(counts), "top_ids")
    values = column(message.top_logprobs, len(ids), "top_logprobs")
    rows, at = [], 0
    for logprob, count in zip(message.logprobs, counts, strict=True):
        rows.append(
            TokenLogprob(
                logprob=logprob,
                top_ids=tuple(ids[at : at + count]),
                top_logprobs=tuple(values[at : at + count]),
            )
        )
        at += count
    return rows


def _to_moments(message: pb.Journey) -> dict[str, float]:
    check(len(message.moments) <= MAX_MOMENTS, "too many moments")
    return dict(message.moments)


def _to_verdicts(message: pb.Verdicts) -> Verdicts:
    request_ids = labels(message.request_ids)
    length = len(request_ids)
    return Verdicts(
        request_ids=request_ids,
        attempts=column(message.attempts, length, "attempts"),
        kinds=column(labels(message.kinds), length, "kinds"),
        reasons=column(labels(message.reasons), length, "reasons"),
        num_bytes=column(message.num_bytes, length, "num_bytes"),
        seconds=column(message.seconds, length, "seconds"),
        exposed=column(message.exposed, length, "exposed"),
    )


def from_down(down: cm.GenerationsDown) -> pb.GenerationsDown:
    """To protobuf."""
    cancels = down.cancels
    return pb.GenerationsDown(
        acks=_from_positions(down.acks),
        again=_from_positions(down.again),
        cancels=pb.Cancels(request_ids=cancels.request_ids, attempts=cancels.attempts),
    )


def to_down(message: pb.GenerationsDown) -> cm.GenerationsDown:
    """From protobuf."""
    request_ids = labels(message.cancels.request_ids)
    attempts = column(message.cancels.attempts, len(request_ids), "attempts")
    return cm.GenerationsDown(
        acks=_to_positions(message.acks),
        again=_to_positions(message.again),
        cancels=cm.Cancels(request_ids=request_ids, attempts=attempts),
    )


def _from_positions(positions: cm.Positions) -> pb.Positions:
    return pb.Positions(
        request_ids=positions.request_ids,
        attempts=positions.attempts,
        choices=positions.choices,
        nexts=positions.nexts,
    )


def _to_positions(message: pb.Positions) -> cm.Positions:
    request_ids = labels(message.request_ids)
    length = len(request_ids)
    return cm.Positions(
        request_ids=request_ids,
        attempts=column(message.attempts, length, "attempts"),
        choices=column(message.choices, length, "choices"),
        nexts=column(message.nexts, length, "nexts"),
    )


# --- heartbeats


def from_heartbeat(beat: cm.Heartbeat) -> pb.HeartbeatRequest:
    """To protobuf."""
    load, progress = beat.load, beat.progress
    links = [
        pb.LinkState(
            peer=link.peer, incarnation=link.incarnation, linked=link.linked, reason=link.reason
        )
        for link in beat.links
    ]
    return pb.HeartbeatRequest(
        name=beat.name,
        incarnation=beat.incarnation,
        sequence=beat.sequence,
        state=beat.state,
        role=beat.role.value,
        load=pb.Load(
            waiting_requests=load.waiting_requests,
            running_requests=load.running_requests,
            total_blocks=load.total_blocks,
            free_blocks=load.free_blocks,
            reserved_blocks=load.reserved_blocks,
            oldest_wait_s=load.oldest_wait_s,
            recent_max_ttft_s=load.recent_max_ttft_s,
            recent_max_tbt_s=load.recent_max_tbt_s,
        ),
        progress=pb.Progress(
            steps=progress.steps,
            tokens=progress.tokens,
            step_age_s=progress.step_age_s,
            announced_s=progress.announced_s,
        ),
        links=links,
        cache=pb.CacheNews(
            since=beat.cache.since,
            upto=beat.cache.upto,
            reset=beat.cache.reset,
            added=beat.cache.added,
            removed=beat.cache.removed,
        ),
        term=beat.term,
        duty=_from_duty(beat.duty),
    )


def to_heartbeat(message: pb.HeartbeatRequest) -> cm.Heartbeat:
    """From protobuf."""
    check(message.role in {role.value for role in Role}, f"role {message.role}")
    check(len(message.links) <= MAX_ENTRIES, "too many links")
    load, progress = message.load, message.progress
    return cm.Heartbeat(
        name=label(message.name),
        incarnation=label(message.incarnation),
        sequence=message.sequence,
        state=label(message.state),
        role=Role(message.role),
        load=Load(
            waiting_requests=load.waiting_requests,
            running_requests=load.running_requests,
            total_blocks=load.total_blocks,
            free_blocks=load.free_blocks,
            reserved_blocks=load.reserved_blocks,
            oldest_wait_s=load.oldest_wait_s,
            recent_max_ttft_s=load.recent_max_ttft_s,
            recent_max_tbt_s=load.recent_max_tbt_s,
        ),
        progress=Progress(
            steps=progress.steps,
            tokens=progress.tokens,
            step_age_s=progress.step_age_s,
            announced_s=progress.announced_s,
        ),
        links=tuple(
            cm.LinkState(
                peer=label(link.peer),
                incarnation=label(link.incarnation),
                linked=link.linked,
                reason=link.reason[:MAX_TEXT],
            )
            for link in message.links
        ),
        cache=_cache_news(message.cache),
        term=message.term,
        duty=_to_duty(message.duty) if message.HasField("duty") else None,
    )


def from_heartbeat_reply(reply: cm.HeartbeatReply) -> pb.HeartbeatReply:
    """To protobuf."""
    return pb.HeartbeatReply(
        known=reply.known,
        cache_next=reply.cache_next,
        term=reply.term,
        duty=_from_duty(reply.duty),
    )


def to_heartbeat_reply(message: pb.HeartbeatReply) -> cm.HeartbeatReply:
    """From protobuf."""
    return cm.HeartbeatReply(
        known=message.known,
        cache_next=message.cache_next,
        term=message.term,
        duty=_to_duty(message.duty) if message.HasField("duty") else None,
    )


def _from_duty(duty: Duty | None) -> pb.Duty | None:
    if duty is None:
        return None
    return pb.Duty(
        role=duty.role.value,
        term=duty.term,
        epoch=duty.epoch,
        settled=duty.settled,
        by_hand=duty.by_hand,
    )


def _to_duty(message: pb.Duty) -> Duty:
    check(message.role in {role.value for role in Role}, f"duty {message.role}")
    return Duty(
        role=Role(message.role),
        term=message.term,
        epoch=message.epoch,
        settled=message.settled,
        by_hand=message.by_hand,
    )


def _cache_news(message: pb.CacheNews) -> CacheNews:
    for joined in (message.added, message.removed):
        check(len(joined) % HASH_BYTES == 0, "hashes of another length")
        check(len(joined) <= MOST_TOLD * HASH_BYTES, "too many hashes")
    return CacheNews(
        since=message.since,
        upto=message.upto,
        reset=message.reset,
        added=message.added,
        removed=message.removed,
    )
