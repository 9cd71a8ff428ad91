# 0.56B in all: 8 experts, 2 for a token. 556,917,760 parameters, 254,338,048 active.
# As many FLOPs per token as config/size/llama_0.25b.py within 1%. The paper's MoE shapes are unknown; all is ours.
n_layer, n_head, n_embd = 12, 16, 1024
n_experts, experts_per_token, expert_dim = 8, 2, 1368
init_std, embedding_std = 0.02, 0.02
vocab_size, block_size = 50304, 1024
dataset = "fineweb"
batch_tokens, micro_batch = 512 * 1024, 8
max_steps = 100 * 254_338_048 // batch_tokens  # 100 tokens for each active parameter: the dense size's compute
lr, warmup_steps = 1e-3, 1000
eval_interval, eval_tokens, save_interval = 1000, 10240 * 1024, 1000
