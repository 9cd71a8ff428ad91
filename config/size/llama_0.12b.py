# The paper's dense 0.12B.
# Silent in the paper, so ours [R]: warm-up, init, data.
n_layer, n_head, n_embd = 6, 12, 768
init_std, embedding_std = 0.02, 0.02
vocab_size, block_size = 50304, 1024
dataset = "fineweb"
batch_tokens, micro_batch = 512 * 1024, 32
max_steps = 20000
lr, warmup_steps = 4e-3, 1000
eval_interval, eval_tokens, save_interval = 1000, 10240 * 1024, 1000
