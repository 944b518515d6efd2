"""The flags of `xllm` (SPEC 2.1 to 2.5)."""

from __future__ import annotations

from xllm_py.cli import shared_flags
from xllm_py.cli.flags import Flag, a, b, ignored, in_group

_MODEL = in_group(
    "model and device",
    a(
        "model",
        "string",
        "",
        "model folder, or a name to look for under model_root and the Hugging Face cache",
    ),
    a("model_id", "string", "", "served name; empty: last part of the model's path"),
    a("model_root", "string", "", "folders searched for a bare --model name, comma list"),
    b("served_model_name", "string", "", "further served names, comma list"),
    a(
        "devices",
        "string",
        "",
        "comma list of type:index, as cpu:0, cuda:0 or npu:0, one rank each; empty or auto: the first of npu:0, cuda:0, cpu:0 that is there",
    ),
    b("device_id", "int32", -1, "index on the detected device type"),
    b("backend", "string", "", "empty or llm"),
    b("task", "string", "generate", "generate"),
    a("dtype", "string", "auto", "auto, float32, bfloat16 or float16"),
    b("load_format", "string", "auto", "auto (safetensors) or dummy (seeded random weights)"),
    a(
        "profile_steps",
        "string",
        "",
        "a file: time steps, write them there for scripts/plan, and end",
    ),
    a("quantization", "string", "", "w8a8: 8-bit linears, made at load; empty: as in the file"),
    a("max_model_len", "int32", 0, "tokens of prompt and answer; 0: the model's"),
    a("cpu_threads", "int32", 0, "compute threads per rank; 0: one for each core it may use"),
    a("cpu_affinity", "string", "", "cores the instance runs on, as 0-3,6; empty: all it may use"),
    b(
        "generation_config",
        "string",
        "auto",
        "auto: sampling defaults from the model's generation_config.json; none: our own",
    ),
    a(
        "enable_deterministic",
        "bool",
        True,
        "the same bits whatever batch, chunk or instance; false, on cuda: faster",
    ),
    b(
        "random_seed",
        "int32",
        -1,
        "base of seeds drawn for requests that bring none; -1: the system's",
    ),
    b(
        "logprobs_mode",
        "string",
        "raw",
        "how likely the model found a token: raw, or processed by penalties, temperature and cuts",
    ),
    b("enable_graph", "bool", False, "captured decode graphs on cuda and npu", idle=True),
    b("max_tokens_for_graph_mode", "int32", 2048, "eager above so many tokens", idle=True),
    Flag("draft_model", "string", "", "C", "speculative decoding", True),
    Flag("num_speculative_tokens", "int32", 0, "C", "speculative decoding; not built"),
    Flag("speculative_algorithm", "string", "MTP", "C", "speculative decoding", True),
)
_SERVICE = in_group(
    "service",
    a("host", "string", "", "bind address of all ports; empty: 127.0.0.1"),
    a("advertise_host", "string", "", "address put into the card; empty: host"),
    a("port", "int32", 8010, "HTTP; 0: any free port"),
    a(
        "max_concurrent_requests",
        "int32",
        200,
        "open requests, streams included; over it 429; 0: 65536",
    ),
    a("rpc_channel_timeout_ms", "int32", 5000, "limit of a unary control call"),
    b("rpc_idle_timeout_s", "int32", 600, "an idle control connection is closed", idle=True),
    b(
        "max_reconnect_count",
        "int32",
        40,
        "how long ranks wait for each other at the start, times 1.5 s",
    ),
    b("health_check_interval_ms", "int32", 3000, "engine stalled for so long: /health 503"),
    b("num_request_handling_threads", "int32", 4, "tokenizer and template workers", idle=True),
    b("enable_json_object_output", "bool", True, "allow response_format json_object", idle=True),
    b("banner", "bool", True, "greeting lines on a terminal", idle=True),
    b("dashboard", "bool", False, "the status page", idle=True),
    *shared_flags.service(),
)
_CACHE = in_group(
    "KV cache and scheduler",
    a("block_size", "int32", 128, "tokens per block: 1, 2, 4 ... 256"),
    a("max_cache_size", "int64", 0, "bytes of KV cache; 0: computed"),
    a("max_memory_utilization", "double", 0.8, "share of the device's memory, in (0, 1]"),
    a(
        "enable_prefix_cache",
        "bool",
        True,
        "keep computed blocks for later requests that begin with the same tokens",
    ),
    b("kv_cache_dtype", "string", "auto", "auto: the model's dtype"),
    b("xxh3_128bits_seed", "uint32", 1024, "enters the block-hash chain; equal on P, D and master"),
    a("max_tokens_per_batch", "int32", 10240, "tokens of one step"),
    a("max_seqs_per_batch", "int32", 200, "running sequences"),
    a("enable_chunked_prefill", "bool", True, "false: a prompt is computed in one step"),
    a(
        "max_tokens_per_chunk_for_prefill",
        "int32",
        -1,
        "tokens of a prompt in one step; -1: max_tokens_per_batch",
    ),
    b(
        "chunked_match_frequency",
        "int32",
        2,
        "how often a partly computed prompt is matched again",
        idle=True,
    ),
    b(
        "prefill_scheduling_memory_usage_threshold",
        "double",
        0.95,
        "no new prefill above this share of used blocks",
    ),
    b(
        "enable_schedule_overlap",
        "bool",
        False,
        "plan and begin the next step of decodes while one is computed; gains on devices that compute apart from the host",
    ),
    b(
        "enable_mix_batch",
        "bool",
        True,
        "prompts and decodes in one step; false: prompts first, in steps of their own",
    ),
    b(
        "use_zero_evict",
        "bool",
        False,
        "admit only what can grow to its end beside the others: nobody is preempted",
    ),
    b("priority_strategy", "string", "fcfs", "who goes first: fcfs, priority or deadline"),
    b(
        "enable_online_preempt_offline",
        "bool",
        True,
        "online requests may preempt offline ones",
    ),
    b("request_queue_size", "int32", 100000, "bound of the engine's waiting queue"),
)
_CLUSTER = in_group(
    "disaggregation, cluster, parallel",
    a(
        "enable_disagg_pd",
        "bool",
        False,
        "prefill and decode on different instances; needs etcd_addr and a role",
    ),
    a("instance_role", "string", "DEFAULT", "DEFAULT, PREFILL, DECODE or MIX"),
    a(
        "enable_flexible_role",
        "bool",
        False,
        "a PREFILL or DECODE instance that may be given the other half, or both, as load asks for; MIX always may",
    ),
    a("disagg_pd_port", "int32", 7777, "gRPC control port"),
    a("transfer_listen_port", "int32", 26000, "KV port; local rank i listens on this + i"),
    a(
        "kv_cache_transfer_mode",
        "string",
        "PUSH",
        "of what this instance prefills: PUSH sends the KV, PULL lets the decode instance fetch it",
    ),
    a(
        "enable_service_routing",
        "bool",
        False,
        "register and take work from masters; set by a non-empty etcd_addr",
    ),
    *shared_flags.etcd(""),
    a("etcd_ttl", "int32", 3, "lease of the card, 2 to 60 s"),
    a("heart_beat_interval", "double", 0.1, "seconds between heartbeats, 0.05 to 10"),
    a(
        "master_node_addr",
        "string",
        "127.0.0.1:19888",
        "where the ranks gather when there is more than one node",
    ),
    a("nnodes", "int32", 1, "nodes of this instance"),
    a("node_rank", "int32", 0, "index of this node"),
    b("dp_size", "int32", 1, "engines with a model and a cache each; divides the --devices"),
    b("ep_size", "int32", 1, "groups of ranks with whole experts each; divides the ranks"),
    b("cp_size", "int32", 1, "context parallel"),
    b("kv_split_size", "int32", 1, "1"),
    b(
        "communication_backend",
        "string",
        "hccl",
        "collectives; elsewhere than on npu the device decides",
        idle=True,
    ),
    a(
        "kv_transport",
        "string",
        "tcp",
        "tcp; auto: shared memory between instances of one host that both say so, else tcp; nixl, mooncake: payloads through "
        "these engines between instances that both say so (pip install 'xllm_py[nixl]'), else tcp",
    ),
    b("kv_poison", "bool", False, "fill KV blocks with nonsense before use; for tests, slow"),
    b("kv_streams", "int32", 1, "TCP connections from this instance to one peer, 1 to 16"),
    a("hccn_conf", "string", "/etc/hccn.conf", "device addresses of npu hosts, for the card"),
    a(
        "grant_ttl_s",
        "double",
        30.0,
        "a reservation on D without a sign of life ends after so long",
    ),
    a(
        "handoff_hold_s",
        "double",
        5.0,
        "P keeps the KV of a refused or lost request so long",
        idle=True,
    ),
    a("enable_local_decode", "bool", True, "P may decode a request that no D takes"),
)
_C_BOOLS = """acl_graph acl_graph_no_padding aclnn_matmul aclnn_swiglu adaptive_speculative_decode atb_spec_kernel
beam_search_kernel block_copy_kernel cache_upload constrained_decoding continuous_kvcache control_h2d_block_num
convert_tokens_to_item customize_mla_kernel dp_balance dspark_native_sas dump_config_json eplb extended_item_info flashcomm1
forward_interruption graph_double_buffer graph_mode_decode_no_padding graph_no_padding graph_vmm_pool in_batch_prefix_cache
interlayer_addnorm intralayer_addnorm kvcache_store latency_aware_schedule manual_loader mega_moe mla mm_encoder_dp mmrs_fusion
mtp_draft_body_tp1 multi_stream_parallel online_profile opt_validate_probs output_sku_logprobs prefetch_weight
prefill_piecewise_graph prefill_sp profile_kv_blocks profile_step_time profile_token_budget qwen3_reranker rec_fast_sampler
rec_prefill_only return_mm_full_embeddings rolling_load shm split_rmsnorm_rope starve_prevent topk_sorted verbose_trace_log
xattention_one_stage xtensor"""
_C_PLAIN_BOOLS = """disable_graph_warmup disable_ttft_profiling dit_debug_print dit_enable_vae_tiling dit_laser_attention_enabled
dit_sp_communication_overlap dit_sparse_attention_enabled eplb_use_decode_only_load kv_push_dst_rotate output_rec_logprobs
speculative_suffix_use_tree_spec use_audio_in_video use_contiguous_input_buffer use_cpp_chat_template use_mix_scheduler"""
_C_VALUES = """kv_cache_transfer_type device_ip npu_phy_id draft_devices rank_tablefile xservice_addr murmur_hash3_seed num_threads
num_handling_threads num_response_handling_threads model_impl python_model_path python_graph_backend npu_kernel_backend
enable_fused_mc2 mmrs_comm_mode flashinfer_workspace_buffer_size indexer_cache_dtype max_linear_state_cache_slots
xtensor_master_node_addr phy_page_granularity_size buffer_size_per_seq cache_size_per_token host_blocks_factor
layers_wise_copy_batchs max_decode_token_per_sequence aggressive_coeff starve_threshold max_global_ttft_ms max_global_tpot_ms
layerwise_split_size micro_batch_num tp_size sp_size cfg_size vae_size text_encoder_tp_size redundant_experts_num
expert_parallel_degree limit_image_per_prompt max_encoder_cache_size max_processor_cache_items mm_download_headers
acl_graph_decode_batch_size_limit graph_decode_batch_size_limit max_seq_len_for_graph_mode input_shm_size output_shm_size
adaptive_speculative_min_gain flashcomm1_min_prefill_tokens max_decode_rounds max_requests_per_batch max_sequence_length
each_conversion_threshold total_conversion_threshold rec_worker_max_concurrency max_connect_count sleep_time_second
max_concurrency timeout_ms idle_timeout_s beam_width dump_config_json_file"""

TABLE: list[Flag] = [
    *_MODEL,
    *_SERVICE,
    *_CACHE,
    *_CLUSTER,
    *in_group("security", *shared_flags.security()),
    *in_group("logs", *shared_flags.logs()),
    *in_group("ignored", Flag("enable_pd_ooc", "bool", False, "C", "not built")),
    *ignored(" ".join(f"enable_{name}" for name in _C_BOOLS.split()), "bool"),
    *ignored(_C_PLAIN_BOOLS, "bool"),
    *ignored(_C_VALUES, "string"),
    *ignored(shared_flags.GLOG, "bool"),
    *ignored(shared_flags.GLOG_VALUES, "string"),
]
IGNORED_PREFIXES = (
    "dit_",
    "eplb_",
    "store_",
    "prefetch_",
    "profile_",
    "rolling_load_",
    "speculative_suffix_",
    "verbose_trace_log_",
)
