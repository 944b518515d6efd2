"""The flags of SPEC section 2, frozen: name, type, default, priority. A change here is a change of the outward contract."""

from __future__ import annotations

XLLM = """
model string "" A
model_id string "" A
devices string "" A
device_id int32 -1 B
backend string "" B
task string generate B
reasoning_parser string "" B
tool_call_parser string "" B
random_seed int32 -1 B
enable_graph bool false B
max_tokens_for_graph_mode int32 2048 B
model_root string "" A
served_model_name string "" B
dtype string auto A
load_format string auto B
quantization string "" A
profile_steps string "" A
max_model_len int32 0 A
cpu_threads int32 0 A
cpu_affinity string "" A
generation_config string auto B
enable_deterministic bool true A
logprobs_mode string raw B
host string "" A
advertise_host string "" A
port int32 8010 A
max_concurrent_requests int32 200 A
rpc_channel_timeout_ms int32 5000 A
rpc_idle_timeout_s int32 600 B
max_reconnect_count int32 40 B
health_check_interval_ms int32 3000 B
num_request_handling_threads int32 4 B
enable_json_object_output bool true B
request_timeout_s double 600 A
drain_timeout_s double 30 A
max_queue_size int32 1024 A
max_body_bytes int32 1048576 A
max_best_of int32 8 A
max_logprobs int32 20 B
cluster_key_file string "" A
tls_cert_file string "" B
tls_key_file string "" B
tls_ca_file string "" B
api_key_file string "" B
allow_insecure_http bool false A
allowed_hosts string "" B
log_level string info B
log_format string text B
verbose bool false B
banner bool true B
metrics bool true A
dashboard bool false B
debug_endpoints bool false A
block_size int32 128 A
max_cache_size int64 0 A
max_memory_utilization double 0.8 A
enable_prefix_cache bool true A
kv_cache_dtype string auto B
xxh3_128bits_seed uint32 1024 B
max_tokens_per_batch int32 10240 A
max_seqs_per_batch int32 200 A
enable_chunked_prefill bool true A
max_tokens_per_chunk_for_prefill int32 -1 A
chunked_match_frequency int32 2 B
prefill_scheduling_memory_usage_threshold double 0.95 B
enable_schedule_overlap bool false B
enable_mix_batch bool true B
use_zero_evict bool false B
priority_strategy string fcfs B
enable_online_preempt_offline bool true B
request_queue_size int32 100000 B
enable_disagg_pd bool false A
instance_role string DEFAULT A
enable_flexible_role bool false A
disagg_pd_port int32 7777 A
transfer_listen_port int32 26000 A
kv_cache_transfer_mode string PUSH A
enable_service_routing bool false A
etcd_addr string "" A
etcd_namespace string "" B
etcd_ttl int32 3 A
heart_beat_interval double 0.1 A
master_node_addr string 127.0.0.1:19888 A
nnodes int32 1 A
node_rank int32 0 A
dp_size int32 1 B
ep_size int32 1 B
cp_size int32 1 B
kv_split_size int32 1 B
communication_backend string hccl B
kv_transport string tcp A
kv_streams int32 1 B
kv_poison bool false B
hccn_conf string /etc/hccn.conf A
grant_ttl_s double 30 A
handoff_hold_s double 5 A
enable_local_decode bool true A
etcd_timeout_s double 5 A
etcd_start_timeout_s double 60 A
enable_failpoints bool false C
draft_model string "" C
num_speculative_tokens int32 0 C
speculative_algorithm string MTP C
enable_pd_ooc bool false C
"""
# accepted and ignored: `enable_` in front of each
XLLM_C_ENABLE = """
acl_graph acl_graph_no_padding aclnn_matmul aclnn_swiglu adaptive_speculative_decode atb_spec_kernel
beam_search_kernel block_copy_kernel cache_upload constrained_decoding continuous_kvcache control_h2d_block_num
convert_tokens_to_item customize_mla_kernel dp_balance dspark_native_sas dump_config_json eplb extended_item_info
flashcomm1 forward_interruption graph_double_buffer graph_mode_decode_no_padding graph_no_padding graph_vmm_pool
in_batch_prefix_cache interlayer_addnorm intralayer_addnorm kvcache_store latency_aware_schedule manual_loader
mega_moe mla mm_encoder_dp mmrs_fusion mtp_draft_body_tp1 multi_stream_parallel online_profile opt_validate_probs
output_sku_logprobs prefetch_weight prefill_piecewise_graph prefill_sp profile_kv_blocks profile_step_time
profile_token_budget qwen3_reranker rec_fast_sampler rec_prefill_only return_mm_full_embeddings rolling_load shm
split_rmsnorm_rope starve_prevent topk_sorted verbose_trace_log xattention_one_stage xtensor
"""
XLLM_C_BOOL = """
disable_graph_warmup disable_ttft_profiling dit_debug_print dit_enable_vae_tiling dit_laser_attention_enabled
dit_sp_communication_overlap dit_sparse_attention_enabled eplb_use_decode_only_load kv_push_dst_rotate
output_rec_logprobs speculative_suffix_use_tree_spec use_audio_in_video use_contiguous_input_buffer
use_cpp_chat_template use_mix_scheduler
"""
XLLM_C_VALUE = """
kv_cache_transfer_type device_ip npu_phy_id draft_devices rank_tablefile xservice_addr murmur_hash3_seed num_threads
num_handling_threads num_response_handling_threads model_impl python_model_path python_graph_backend
npu_kernel_backend enable_fused_mc2 mmrs_comm_mode flashinfer_workspace_buffer_size indexer_cache_dtype
max_linear_state_cache_slots xtensor_master_node_addr phy_page_granularity_size buffer_size_per_seq
cache_size_per_token host_blocks_factor layers_wise_copy_batchs max_decode_token_per_sequence aggressive_coeff
starve_threshold max_global_ttft_ms max_global_tpot_ms layerwise_split_size micro_batch_num tp_size sp_size cfg_size
vae_size text_encoder_tp_size redundant_experts_num expert_parallel_degree limit_image_per_prompt
max_encoder_cache_size max_processor_cache_items mm_download_headers acl_graph_decode_batch_size_limit
graph_decode_batch_size_limit max_seq_len_for_graph_mode input_shm_size output_shm_size adaptive_speculative_min_gain
flashcomm1_min_prefill_tokens max_decode_rounds max_requests_per_batch max_sequence_length each_conversion_threshold
total_conversion_threshold rec_worker_max_concurrency max_connect_count sleep_time_second max_concurrency timeout_ms
idle_timeout_s beam_width dump_config_json_file
"""
XLLM_C_PREFIXES = (
    "dit_ eplb_ store_ prefetch_ profile_ rolling_load_ speculative_suffix_ verbose_trace_log_"
)
GLOG = "logtostderr alsologtostderr stderrthreshold vmodule max_log_size"
GLOG_TAKEN = """
minloglevel int32 0 B
v int32 0 B
log_dir string "" B
config_json_file string "" B
"""
MASTER = """
server_host string "" A
advertise_host string "" A
http_server_port int32 8888 A
rpc_server_port int32 8889 A
http_server_max_concurrency int32 16384 A
http_server_idle_timeout_s int32 75 B
rpc_server_idle_timeout_s int32 600 B
rpc_server_max_concurrency int32 128 B
tokenizer_path string "" A
etcd_addr string 127.0.0.1:2379 A
etcd_namespace string "" B
load_balance_policy string RR A
block_size int32 128 B
xxh3_128bits_seed uint32 1024 B
target_ttft int32 1000 B
target_tpot int32 50 B
timeout_ms int32 5000 A
connect_timeout_ms int32 1000 A
detect_disconnected_instance_interval int32 15 A
instance_delete_probe_timeout_ms int32 1000 B
instance_delete_probe_attempts int32 2 B
reasoning_parser string "" B
tool_call_parser string "" B
enable_request_trace bool false B
suspect_after_ms int32 500 A
gone_after_ms int32 1000 A
queue_timeout_s double 60 A
max_attempts int32 3 A
embedded_etcd bool false B
allow_approximate_failover bool false B
dashboard bool true B
default_backend_type string xllm C
"""
MASTER_AS_XLLM = """
request_timeout_s max_queue_size drain_timeout_s max_body_bytes max_best_of max_logprobs cluster_key_file tls_cert_file
tls_key_file tls_ca_file api_key_file allow_insecure_http allowed_hosts log_level log_format verbose metrics debug_endpoints
etcd_timeout_s etcd_start_timeout_s enable_failpoints
"""
MASTER_C = """
http_server_num_threads rpc_server_num_threads num_threads max_concurrency port listen_addr idle_timeout_s
readiness_check_interval_s lease_lost_heartbeat_timeout_ms vllm_http_timeout_ms internal_api_token
"""


def rows(table: str) -> list[tuple[str, ...]]:
    """The lines of a table, cut into words; an empty string is written as two quotes."""
    return [tuple(line.split()) for line in table.split("\n") if line]
