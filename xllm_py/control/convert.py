"""Protobuf messages of calls about requests to our values and back; convert_streams does the rest.

These two and the gRPC ends are the only files that look into a message's fields.

Every `to_*` of something a peer sent checks counts and lengths before it builds anything, and raises ProtocolViolation;
values whose own class validates them may also raise InvalidValue.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm_py.control.bounds import (
    MAX_CARD_BYTES,
    MAX_GRAMMAR,
    MAX_IDS,
    MAX_OFFERS,
    MAX_SUBMISSIONS,
    MAX_TEXT,
    check,
    column,
    label,
    labels,
)
from xllm_py.control.pb import xllm_pb2 as pb
from xllm_py.core.request import (
    MAX_ORIGIN,
    FirstToken,
    Offer,
    OfferAnswer,
    Receiver,
    Submission,
)
from xllm_py.core.sampling import MAX_BEST_OF, SamplingParams
from xllm_py.wire.control_messages import LinkHealth

# --- submissions


def from_submission(submission: Submission) -> pb.Submission:
    """To protobuf."""
    sampling = submission.sampling
    receiver = submission.receiver
    return pb.Submission(
        request_id=submission.request_id,
        attempt=submission.attempt,
        prompt_ids=submission.prompt_ids,
        generated_ids=submission.generated_ids,
        sampling=pb.Sampling(
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            stop=sampling.stop,
            stop_token_ids=sampling.stop_token_ids,
            include_stop_str_in_output=sampling.include_stop_str_in_output,
            ignore_eos=sampling.ignore_eos,
            skip_special_tokens=sampling.skip_special_tokens,
            best_of=sampling.best_of,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            repetition_penalty=sampling.repetition_penalty,
            bias_ids=[token for token, _ in sampling.logit_bias],
            biases=[bias for _, bias in sampling.logit_bias],
            min_tokens=sampling.min_tokens,
            logprobs=sampling.logprobs,
            prompt_logprobs=sampling.prompt_logprobs,
            grammar=sampling.grammar,
        ),
        timeout_s=submission.timeout_s,
        receiver=None
        if receiver is None
        else pb.Receiver(
            name=receiver.name, address=receiver.address, incarnation=receiver.incarnation
        ),
        master=submission.master,
        relay=submission.relay,
        model=submission.model,
        cache_salt=submission.cache_salt,
        priority=submission.priority,
        offline=submission.offline,
        ttft_slo_ms=submission.ttft_slo_ms,
        tpot_slo_ms=submission.tpot_slo_ms,
        trace=submission.trace,
        stream_id=submission.stream_id,
        origin=submission.origin,
    )


def to_submissions(message: pb.SubmitRequest) -> list[Submission]:
    """From protobuf."""
    count = len(message.submissions)
    check(0 < count <= MAX_SUBMISSIONS, f"{count} submissions")
    return [to_submission(each) for each in message.submissions]


def to_submission(message: pb.Submission) -> Submission:
    """From protobuf. A submission without prompt, sampling or id is refused."""
    check(bool(message.request_id), "a submission has no request id")
    check(message.HasField("sampling"), "a submission has no sampling")
    num_ids = len(message.prompt_ids) + len(message.generated_ids)
    check(len(message.prompt_ids) > 0 and num_ids <= MAX_IDS, f"a submission of {num_ids} tokens")
    check(0 < message.timeout_s < float("inf"), "a submission without time")
    check(len(message.origin) <= MAX_ORIGIN, "the origin of a submission is too long")
    receiver = message.receiver
    return Submission(
        request_id=label(message.request_id),
        attempt=message.attempt,
        prompt_ids=tuple(message.prompt_ids),
        generated_ids=tuple(message.generated_ids),
        sampling=_to_sampling(message.sampling),
        timeout_s=message.timeout_s,
        receiver=Receiver(
            name=label(receiver.name),
            address=label(receiver.address),
            incarnation=label(receiver.incarnation),
        )
        if message.HasField("receiver")
        else None,
        master=label(message.master),
        relay=message.relay,
        model=label(message.model),
        cache_salt=label(message.cache_salt),
        priority=message.priority,
        offline=message.offline,
        ttft_slo_ms=message.ttft_slo_ms,
        tpot_slo_ms=message.tpot_slo_ms,
        trace=label(message.trace),
        stream_id=label(message.stream_id),
        origin=message.origin,
    )


def _to_sampling(message: pb.Sampling) -> SamplingParams:
    check(len(message.grammar) <= MAX_GRAMMAR, "a grammar is too long")
    biases = column(message.biases, len(message.bias_ids), "biases")
    return SamplingParams(
        max_tokens=message.max_tokens,
        seed=message.seed,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        include_stop_str_in_output=message.include_stop_str_in_output,
        ignore_eos=message.ignore_eos,
        skip_special_tokens=message.skip_special_tokens,
        best_of=message.best_of,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=tuple(zip(message.bias_ids, biases, strict=True)),
        min_tokens=message.min_tokens,
        logprobs=message.logprobs,
        prompt_logprobs=message.prompt_logprobs,
        grammar=message.grammar,
    )


# --- handoff


def from_offers(offers: Sequence[Offer]) -> pb.AddNewRequestsRequest:
    """To protobuf."""
    rows = [
        pb.Offer(
            submission=from_submission(offer.submission),
            giver_name=offer.giver_name,
            giver_address=offer.giver_address,
            giver_incarnation=offer.giver_incarnation,
            model_fingerprint=offer.model_fingerprint,
            layout_fingerprint=offer.layout_fingerprint,
            block_size=offer.block_size,
            read_grant=offer.read_grant,
            endpoints=offer.endpoints,
        )
        for offer in offers
    ]
    return pb.AddNewRequestsRequest(offers=rows)


def to_offers(message: pb.AddNewRequestsRequest) -> list[Offer]:
    """From protobuf."""
    check(len(message.offers) <= MAX_OFFERS, "too many offers")
    return [
        Offer(
            submission=to_submission(row.submission),
            giver_name=label(row.giver_name),
            giver_address=label(row.giver_address),
            giver_incarnation=label(row.giver_incarnation),
            model_fingerprint=label(row.model_fingerprint),
            layout_fingerprint=label(row.layout_fingerprint),
            block_size=row.block_size,
            read_grant=_grant(row.read_grant),
            endpoints=tuple(labels(row.endpoints)),
        )
        for row in message.offers
    ]


def from_answers(answers: Sequence[OfferAnswer]) -> pb.AddNewRequestsReply:
    """To protobuf."""
    rows = [
        pb.OfferAnswer(
            request_id=answer.request_id,
            attempt=answer.attempt,
            grant=answer.grant,
            block_size=answer.block_size,
            num_held_blocks=answer.num_held_blocks,
            num_blocks=answer.num_blocks,
            endpoints=answer.endpoints,
            stream=answer.stream,
            expires_s=answer.expires_s,
            refusal=answer.refusal,
            text=answer.text,
            retry_after_s=answer.retry_after_s,
        )
        for answer in answers
    ]
    return pb.AddNewRequestsReply(answers=rows)


def to_answers(message: pb.AddNewRequestsReply) -> list[OfferAnswer]:
    """From protobuf."""
    check(len(message.answers) <= MAX_OFFERS, "too many answers")
    for row in message.answers:
        check(not row.grant or len(row.endpoints) > 0, "a grant without an endpoint")
    return [
        OfferAnswer(
            request_id=label(row.request_id),
            attempt=row.attempt,
            grant=_grant(row.grant),
            block_size=row.block_size,
            num_held_blocks=row.num_held_blocks,
            num_blocks=row.num_blocks,
            endpoints=tuple(labels(row.endpoints)),
            stream=row.stream,
            expires_s=row.expires_s,
            refusal=label(row.refusal),
            text=row.text[:MAX_TEXT],
            retry_after_s=row.retry_after_s,
        )
        for row in message.answers
    ]


def _grant(grant: bytes) -> bytes:
    check(len(grant) in (0, 16), "a grant is 16 bytes")
    return grant


def from_firsts(firsts: Sequence[FirstToken]) -> pb.FirstGenerationRequest:
    """To protobuf."""
    rows = [
        pb.FirstToken(
            request_id=first.request_id,
            attempt=first.attempt,
            grant=first.grant,
            token_ids=first.token_ids,
            cached_tokens=first.cached_tokens,
        )
        for first in firsts
    ]
    return pb.FirstGenerationRequest(firsts=rows)


def to_firsts(message: pb.FirstGenerationRequest) -> list[FirstToken]:
    """From protobuf."""
    check(len(message.firsts) <= MAX_OFFERS, "too many first tokens")
    for row in message.firsts:
        check(0 < len(row.token_ids) <= MAX_BEST_OF, f"{len(row.token_ids)} first tokens")
    return [
        FirstToken(
            request_id=label(row.request_id),
            attempt=row.attempt,
            grant=_grant(row.grant),
            token_ids=tuple(row.token_ids),
            cached_tokens=row.cached_tokens,
        )
        for row in message.firsts
    ]


def to_cancel(message: pb.CancelRequest) -> tuple[list[str], list[int], str]:
    """(request ids, attempts, reason)."""
    request_ids = labels(message.request_ids)
    attempts = column(message.attempts, len(request_ids), "attempts")
    return request_ids, attempts, label(message.reason)


def from_health(health: LinkHealth) -> pb.ProbePeerReply:
    """To protobuf."""
    return pb.ProbePeerReply(
        works=health.works,
        reason=health.reason,
        round_trip_s=health.round_trip_s,
        bytes_per_s=health.bytes_per_s,
    )


def to_health(message: pb.ProbePeerReply) -> LinkHealth:
    """From protobuf."""
    check(message.round_trip_s >= 0 and message.bytes_per_s >= 0, "a negative time or rate")
    return LinkHealth(
        works=message.works,
        reason=message.reason[:MAX_TEXT],
        round_trip_s=message.round_trip_s,
        bytes_per_s=message.bytes_per_s,
    )


def to_card_json(raw: bytes) -> bytes:
    """A card as its owner signed it; parsed elsewhere."""
    check(0 < len(raw) <= MAX_CARD_BYTES, f"a card of {len(raw)} bytes")
    return raw
