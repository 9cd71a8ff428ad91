# The paper's mixture of experts with 2B, of which 0.62B active.
# Silent in the paper, so ours [R]: warm-up, init, data.
n_layer, n_head, n_embd = 15, 20, 1280
n_experts, experts_per_token, expert_dim, shared_dim = 32, 4, 853, 3413  # int(2d/3), int(8d/3)
init_std, embedding_std = 0.02, 0.02
vocab_size, block_size = 50304, 4096
dataset = "fineweb"
batch_tokens, micro_batch = 512 * 4096, 1
max_steps = 30000
lr, warmup_steps = 6e-4, 1000
eval_interval, eval_tokens, save_interval = 1000, 10240 * 1024, 1000
