# The paper's dense 0.75B.
# Silent in the paper, so ours [R]: warm-up, init, data.
n_layer, n_head, n_embd = 21, 24, 1536
init_std, embedding_std = 0.02, 0.02
vocab_size, block_size = 50304, 4096
dataset = "fineweb"
batch_tokens, micro_batch = 512 * 4096, 4
max_steps = 37500
lr, warmup_steps = 2e-3, 1000
eval_interval, eval_tokens, save_interval = 1000, 10240 * 1024, 1000
