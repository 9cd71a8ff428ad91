# The paper's mixture of experts with 0.25B, of which 0.11B active.
# Silent in the paper, so ours [R]: warm-up, init, data.
n_layer, n_head, n_embd = 6, 10, 640
n_experts, experts_per_token, expert_dim, shared_dim = 32, 4, 426, 1706  # int(2d/3), int(8d/3)
init_std, embedding_std = 0.02, 0.02
vocab_size, block_size = 50304, 1024
dataset = "fineweb"
batch_tokens, micro_batch = 512 * 1024, 16
max_steps = 20000
lr, warmup_steps = 3e-3, 1000
eval_interval, eval_tokens, save_interval = 1000, 10240 * 1024, 1000
