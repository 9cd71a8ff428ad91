# 2B, a size of the paper's. Shape, lr, batch and data are ours.
n_layer, n_head, n_embd = 28, 36, 2304
init_std, embedding_std = 0.02, 0.02
vocab_size, block_size = 50304, 1024
dataset = "fineweb"
batch_tokens, micro_batch = 512 * 1024, 4
max_steps = 100 * 2_015_559_936 // batch_tokens  # 100 tokens for each parameter of the baseline, as in the paper
lr, warmup_steps = 4e-4, 1000
eval_interval, eval_tokens, save_interval = 1000, 10240 * 1024, 1000
