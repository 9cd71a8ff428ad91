# 0.5B, a size of the paper's. Shape, lr, batch and data are ours.
n_layer, n_head, n_embd = 18, 20, 1280
init_std, embedding_std = 0.02, 0.02
vocab_size, block_size = 50304, 1024
dataset = "fineweb"
batch_tokens, micro_batch = 512 * 1024, 16
max_steps = 100 * 482_696_960 // batch_tokens  # 100 tokens for each parameter of the baseline, as in the paper
lr, warmup_steps = 6e-4, 1000
eval_interval, eval_tokens, save_interval = 1000, 10240 * 1024, 1000
