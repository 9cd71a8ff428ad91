# The quickstart as a mixture: 8 experts, 2 for a token. 2,397,312 parameters, 849,024 active.
# As many FLOPs per token as config/size/quickstart.py within 1%. All values are ours.
n_layer, n_head, n_embd = 4, 4, 128
n_experts, experts_per_token, expert_dim = 8, 2, 168
vocab_size, block_size = 256, 256
dataset = "pysrc"
batch_tokens, micro_batch = 4096, 16
max_steps = 700
lr, warmup_steps = 2e-3, 50
eval_interval, eval_tokens, save_interval = 100, 65536, 100
