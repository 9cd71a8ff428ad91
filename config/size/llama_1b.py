# 1B: the paper's 1,028,065,024 parameters, 80,640 of them scale. The shape follows from these but for n_head; that,
# lr, batch and data are ours.
n_layer, n_head, n_embd = 22, 28, 1792
init_std, embedding_std = 0.02, 0.02
vocab_size, block_size = 50304, 1024
dataset = "fineweb"
batch_tokens, micro_batch = 512 * 1024, 8
max_steps = 100 * 1_028_065_024 // batch_tokens  # 100 tokens for each parameter of the baseline, as in the paper
lr, warmup_steps = 6e-4, 1000
eval_interval, eval_tokens, save_interval = 1000, 10240 * 1024, 1000
