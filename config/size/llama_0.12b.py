# 0.12B, a size of the paper's. Shape, lr, batch and data are ours.
n_layer, n_head, n_embd = 6, 12, 768
init_std, embedding_std = 0.02, 0.02
vocab_size, block_size = 50304, 1024
dataset = "fineweb"
batch_tokens, micro_batch = 512 * 1024, 32
max_steps = 100 * 119_744_256 // batch_tokens  # 100 tokens for each parameter of the baseline, as in the paper
lr, warmup_steps = 1e-3, 1000
eval_interval, eval_tokens, save_interval = 1000, 10240 * 1024, 1000
