# The paper's mixture of experts with 0.5B, of which 0.18B active. It prints a width of 748, which heads of 64 do not
# divide and which does not give this count.
# Silent in the paper, so ours [R]: warm-up, init, data.
n_layer, n_head, n_embd = 9, 12, 768
n_experts, experts_per_token, expert_dim, shared_dim = 32, 4, 512, 2048  # int(2d/3), int(8d/3)
init_std, embedding_std = 0.02, 0.02
vocab_size, block_size = 50304, 1024
dataset = "fineweb"
batch_tokens, micro_batch = 512 * 1024, 16
max_steps = 30000
lr, warmup_steps = 2e-3, 1000
eval_interval, eval_tokens, save_interval = 1000, 10240 * 1024, 1000
