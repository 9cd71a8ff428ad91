# The paper's mixture scaled down to the lab: 32 experts of int(2d/3), 4 per token, and a shared one of int(8d/3). All
# other values are ours: 651,328 parameters, 199,744 active, 20 tokens per active parameter.
n_layer, n_head, n_embd = 2, 2, 64
n_experts, experts_per_token, expert_dim, shared_dim = 32, 4, 42, 170
vocab_size, block_size = 256, 128
dataset = "pysrc"
batch_tokens, micro_batch = 2048, 16
max_steps = 20 * 199_744 // batch_tokens
lr, warmup_steps = 8e-3, 100
eval_interval, eval_tokens, save_interval = 500, 262144, 1000
