from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "seed", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "best_of", "frequency_penalty", "presence_penalty", "repetition_penalty", "bias_ids", "biases", "min_tokens", "logprobs", "prompt_logprobs", "grammar")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_STOP_STR_IN_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BEST_OF_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    include_stop_str_in_output: bool
    ignore_eos: bool
    skip_special_tokens: bool
    best_of: int
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    bias_ids: _containers.RepeatedScalarFieldContainer[int]
    biases: _containers.RepeatedScalarFieldContainer[float]
    min_tokens: int
    logprobs: int
    prompt_logprobs: int
    grammar: str
    def __init__(self, max_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., include_stop_str_in_output: bool = ..., ignore_eos: bool = ..., skip_special_tokens: bool = ..., best_of: _Optional[int] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., bias_ids: _Optional[_Iterable[int]] = ..., biases: _Optional[_Iterable[float]] = ..., min_tokens: _Optional[int] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., grammar: _Optional[str] = ...) -> None: ...

class Receiver(_message.Message):
    __slots__ = ("name", "address", "incarnation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    incarnation: str
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[str] = ...) -> None: ...

class Submission(_message.Message):
    __slots__ = ("request_id", "attempt", "prompt_ids", "generated_ids", "sampling", "timeout_s", "receiver", "master", "relay", "model", "cache_salt", "priority", "offline", "ttft_slo_ms", "tpot_slo_ms", "trace", "stream_id", "origin")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    MASTER_FIELD_NUMBER: _ClassVar[int]
    RELAY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    OFFLINE_FIELD_NUMBER: _ClassVar[int]
    TTFT_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    TPOT_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    generated_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    timeout_s: float
    receiver: Receiver
    master: str
    relay: bool
    model: str
    cache_salt: str
    priority: int
    offline: bool
    ttft_slo_ms: float
    tpot_slo_ms: float
    trace: str
    stream_id: str
    origin: bytes
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., generated_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., timeout_s: _Optional[float] = ..., receiver: _Optional[_Union[Receiver, _Mapping]] = ..., master: _Optional[str] = ..., relay: bool = ..., model: _Optional[str] = ..., cache_salt: _Optional[str] = ..., priority: _Optional[int] = ..., offline: bool = ..., ttft_slo_ms: _Optional[float] = ..., tpot_slo_ms: _Optional[float] = ..., trace: _Optional[str] = ..., stream_id: _Optional[str] = ..., origin: _Optional[bytes] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("submissions",)
    SUBMISSIONS_FIELD_NUMBER: _ClassVar[int]
    submissions: _containers.RepeatedCompositeFieldContainer[Submission]
    def __init__(self, submissions: _Optional[_Iterable[_Union[Submission, _Mapping]]] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("refusals",)
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    refusals: _containers.RepeatedCompositeFieldContainer[Refusal]
    def __init__(self, refusals: _Optional[_Iterable[_Union[Refusal, _Mapping]]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("index", "message", "told")
    class ToldEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    INDEX_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TOLD_FIELD_NUMBER: _ClassVar[int]
    index: int
    message: str
    told: _containers.ScalarMap[str, str]
    def __init__(self, index: _Optional[int] = ..., message: _Optional[str] = ..., told: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("submission", "giver_name", "giver_address", "giver_incarnation", "model_fingerprint", "layout_fingerprint", "block_size", "read_grant", "endpoints")
    SUBMISSION_FIELD_NUMBER: _ClassVar[int]
    GIVER_NAME_FIELD_NUMBER: _ClassVar[int]
    GIVER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GIVER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    READ_GRANT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    submission: Submission
    giver_name: str
    giver_address: str
    giver_incarnation: str
    model_fingerprint: str
    layout_fingerprint: str
    block_size: int
    read_grant: bytes
    endpoints: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, submission: _Optional[_Union[Submission, _Mapping]] = ..., giver_name: _Optional[str] = ..., giver_address: _Optional[str] = ..., giver_incarnation: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., layout_fingerprint: _Optional[str] = ..., block_size: _Optional[int] = ..., read_grant: _Optional[bytes] = ..., endpoints: _Optional[_Iterable[str]] = ...) -> None: ...

class OfferAnswer(_message.Message):
    __slots__ = ("request_id", "attempt", "grant", "num_held_blocks", "num_blocks", "endpoints", "expires_s", "refusal", "text", "retry_after_s", "block_size", "stream")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_S_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    grant: bytes
    num_held_blocks: int
    num_blocks: int
    endpoints: _containers.RepeatedScalarFieldContainer[str]
    expires_s: float
    refusal: str
    text: str
    retry_after_s: float
    block_size: int
    stream: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., grant: _Optional[bytes] = ..., num_held_blocks: _Optional[int] = ..., num_blocks: _Optional[int] = ..., endpoints: _Optional[_Iterable[str]] = ..., expires_s: _Optional[float] = ..., refusal: _Optional[str] = ..., text: _Optional[str] = ..., retry_after_s: _Optional[float] = ..., block_size: _Optional[int] = ..., stream: _Optional[int] = ...) -> None: ...

class AddNewRequestsRequest(_message.Message):
    __slots__ = ("offers",)
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    offers: _containers.RepeatedCompositeFieldContainer[Offer]
    def __init__(self, offers: _Optional[_Iterable[_Union[Offer, _Mapping]]] = ...) -> None: ...

class AddNewRequestsReply(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[OfferAnswer]
    def __init__(self, answers: _Optional[_Iterable[_Union[OfferAnswer, _Mapping]]] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("request_id", "attempt", "grant", "cached_tokens", "token_ids")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    grant: bytes
    cached_tokens: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., grant: _Optional[bytes] = ..., cached_tokens: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class FirstGenerationRequest(_message.Message):
    __slots__ = ("firsts",)
    FIRSTS_FIELD_NUMBER: _ClassVar[int]
    firsts: _containers.RepeatedCompositeFieldContainer[FirstToken]
    def __init__(self, firsts: _Optional[_Iterable[_Union[FirstToken, _Mapping]]] = ...) -> None: ...

class FirstGenerationReply(_message.Message):
    __slots__ = ("accepted",)
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    accepted: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, accepted: _Optional[_Iterable[bool]] = ...) -> None: ...

class LinkInstanceRequest(_message.Message):
    __slots__ = ("card_json",)
    CARD_JSON_FIELD_NUMBER: _ClassVar[int]
    card_json: bytes
    def __init__(self, card_json: _Optional[bytes] = ...) -> None: ...

class LinkInstanceReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProbePeerRequest(_message.Message):
    __slots__ = ("card_json", "fetch")
    CARD_JSON_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    card_json: bytes
    fetch: bool
    def __init__(self, card_json: _Optional[bytes] = ..., fetch: bool = ...) -> None: ...

class ProbePeerReply(_message.Message):
    __slots__ = ("works", "reason", "round_trip_s", "bytes_per_s")
    WORKS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    works: bool
    reason: str
    round_trip_s: float
    bytes_per_s: float
    def __init__(self, works: bool = ..., reason: _Optional[str] = ..., round_trip_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class UnlinkInstanceRequest(_message.Message):
    __slots__ = ("name", "incarnation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ...) -> None: ...

class UnlinkInstanceReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_ids", "attempts", "reason")
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    reason: str
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ..., attempts: _Optional[_Iterable[int]] = ..., reason: _Optional[str] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ("states",)
    STATES_FIELD_NUMBER: _ClassVar[int]
    states: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, states: _Optional[_Iterable[str]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("mode", "timeout_s")
    MODE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    mode: str
    timeout_s: float
    def __init__(self, mode: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("num_open",)
    NUM_OPEN_FIELD_NUMBER: _ClassVar[int]
    num_open: int
    def __init__(self, num_open: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("stream_id",)
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    def __init__(self, stream_id: _Optional[str] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class Journey(_message.Message):
    __slots__ = ("moments",)
    class MomentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MOMENTS_FIELD_NUMBER: _ClassVar[int]
    moments: _containers.ScalarMap[str, float]
    def __init__(self, moments: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("logprobs", "num_top", "top_ids", "top_logprobs")
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    num_top: _containers.RepeatedScalarFieldContainer[int]
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprobs: _Optional[_Iterable[float]] = ..., num_top: _Optional[_Iterable[int]] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Outputs(_message.Message):
    __slots__ = ("step", "request_ids", "attempts", "choices", "positions", "token_ids", "finish_reasons", "messages", "cached_tokens", "journeys", "scored", "logprobs", "prompt_logprobs")
    class FinishReasonsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    class MessagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    class CachedTokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    class JourneysEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: Journey
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[Journey, _Mapping]] = ...) -> None: ...
    class PromptLogprobsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: Logprobs
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[Logprobs, _Mapping]] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASONS_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    JOURNEYS_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    step: int
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    choices: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reasons: _containers.ScalarMap[int, str]
    messages: _containers.ScalarMap[int, str]
    cached_tokens: _containers.ScalarMap[int, int]
    journeys: _containers.MessageMap[int, Journey]
    scored: _containers.RepeatedScalarFieldContainer[int]
    logprobs: Logprobs
    prompt_logprobs: _containers.MessageMap[int, Logprobs]
    def __init__(self, step: _Optional[int] = ..., request_ids: _Optional[_Iterable[str]] = ..., attempts: _Optional[_Iterable[int]] = ..., choices: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reasons: _Optional[_Mapping[int, str]] = ..., messages: _Optional[_Mapping[int, str]] = ..., cached_tokens: _Optional[_Mapping[int, int]] = ..., journeys: _Optional[_Mapping[int, Journey]] = ..., scored: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ..., prompt_logprobs: _Optional[_Mapping[int, Logprobs]] = ...) -> None: ...

class Verdicts(_message.Message):
    __slots__ = ("request_ids", "attempts", "kinds", "reasons", "num_bytes", "seconds", "exposed")
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    kinds: _containers.RepeatedScalarFieldContainer[str]
    reasons: _containers.RepeatedScalarFieldContainer[str]
    num_bytes: _containers.RepeatedScalarFieldContainer[int]
    seconds: _containers.RepeatedScalarFieldContainer[float]
    exposed: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ..., attempts: _Optional[_Iterable[int]] = ..., kinds: _Optional[_Iterable[str]] = ..., reasons: _Optional[_Iterable[str]] = ..., num_bytes: _Optional[_Iterable[int]] = ..., seconds: _Optional[_Iterable[float]] = ..., exposed: _Optional[_Iterable[float]] = ...) -> None: ...

class GenerationsUp(_message.Message):
    __slots__ = ("name", "incarnation", "sequence", "outputs", "verdicts")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    sequence: int
    outputs: Outputs
    verdicts: Verdicts
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., sequence: _Optional[int] = ..., outputs: _Optional[_Union[Outputs, _Mapping]] = ..., verdicts: _Optional[_Union[Verdicts, _Mapping]] = ...) -> None: ...

class Positions(_message.Message):
    __slots__ = ("request_ids", "attempts", "choices", "nexts")
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    NEXTS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    choices: _containers.RepeatedScalarFieldContainer[int]
    nexts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ..., attempts: _Optional[_Iterable[int]] = ..., choices: _Optional[_Iterable[int]] = ..., nexts: _Optional[_Iterable[int]] = ...) -> None: ...

class Cancels(_message.Message):
    __slots__ = ("request_ids", "attempts")
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ..., attempts: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerationsDown(_message.Message):
    __slots__ = ("acks", "again", "cancels")
    ACKS_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    acks: Positions
    again: Positions
    cancels: Cancels
    def __init__(self, acks: _Optional[_Union[Positions, _Mapping]] = ..., again: _Optional[_Union[Positions, _Mapping]] = ..., cancels: _Optional[_Union[Cancels, _Mapping]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("waiting_requests", "running_requests", "total_blocks", "free_blocks", "reserved_blocks", "oldest_wait_s", "recent_max_ttft_s", "recent_max_tbt_s")
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    RECENT_MAX_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    RECENT_MAX_TBT_S_FIELD_NUMBER: _ClassVar[int]
    waiting_requests: int
    running_requests: int
    total_blocks: int
    free_blocks: int
    reserved_blocks: int
    oldest_wait_s: float
    recent_max_ttft_s: float
    recent_max_tbt_s: float
    def __init__(self, waiting_requests: _Optional[int] = ..., running_requests: _Optional[int] = ..., total_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., reserved_blocks: _Optional[int] = ..., oldest_wait_s: _Optional[float] = ..., recent_max_ttft_s: _Optional[float] = ..., recent_max_tbt_s: _Optional[float] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("steps", "tokens", "step_age_s", "announced_s")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCED_S_FIELD_NUMBER: _ClassVar[int]
    steps: int
    tokens: int
    step_age_s: float
    announced_s: float
    def __init__(self, steps: _Optional[int] = ..., tokens: _Optional[int] = ..., step_age_s: _Optional[float] = ..., announced_s: _Optional[float] = ...) -> None: ...

class LinkState(_message.Message):
    __slots__ = ("peer", "incarnation", "linked", "reason")
    PEER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LINKED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    peer: str
    incarnation: str
    linked: bool
    reason: str
    def __init__(self, peer: _Optional[str] = ..., incarnation: _Optional[str] = ..., linked: bool = ..., reason: _Optional[str] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("name", "incarnation", "sequence", "state", "role", "load", "progress", "links", "cache", "term", "duty")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    DUTY_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    sequence: int
    state: str
    role: int
    load: Load
    progress: Progress
    links: _containers.RepeatedCompositeFieldContainer[LinkState]
    cache: CacheNews
    term: int
    duty: Duty
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., sequence: _Optional[int] = ..., state: _Optional[str] = ..., role: _Optional[int] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., links: _Optional[_Iterable[_Union[LinkState, _Mapping]]] = ..., cache: _Optional[_Union[CacheNews, _Mapping]] = ..., term: _Optional[int] = ..., duty: _Optional[_Union[Duty, _Mapping]] = ...) -> None: ...

class Duty(_message.Message):
    __slots__ = ("role", "term", "epoch", "settled", "by_hand")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    BY_HAND_FIELD_NUMBER: _ClassVar[int]
    role: int
    term: int
    epoch: int
    settled: bool
    by_hand: bool
    def __init__(self, role: _Optional[int] = ..., term: _Optional[int] = ..., epoch: _Optional[int] = ..., settled: bool = ..., by_hand: bool = ...) -> None: ...

class CacheNews(_message.Message):
    __slots__ = ("since", "upto", "reset", "added", "removed")
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UPTO_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    since: int
    upto: int
    reset: bool
    added: bytes
    removed: bytes
    def __init__(self, since: _Optional[int] = ..., upto: _Optional[int] = ..., reset: bool = ..., added: _Optional[bytes] = ..., removed: _Optional[bytes] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("known", "cache_next", "term", "duty")
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    CACHE_NEXT_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    DUTY_FIELD_NUMBER: _ClassVar[int]
    known: bool
    cache_next: int
    term: int
    duty: Duty
    def __init__(self, known: bool = ..., cache_next: _Optional[int] = ..., term: _Optional[int] = ..., duty: _Optional[_Union[Duty, _Mapping]] = ...) -> None: ...

class GetInstanceInfoRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetInstanceInfoReply(_message.Message):
    __slots__ = ("card_json",)
    CARD_JSON_FIELD_NUMBER: _ClassVar[int]
    card_json: bytes
    def __init__(self, card_json: _Optional[bytes] = ...) -> None: ...
