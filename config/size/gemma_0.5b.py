# The paper's weight-decay study, figure 3: 0.5B's shape with Gemma's norms, and Muon. (5,000 steps there, too.)
# Silent in the paper, so ours [R]: warm-up, init, data.
arch = "gemma"
n_layer, n_head, n_embd = 18, 20, 1280
init_std, embedding_std = 0.02, 0.02
vocab_size, block_size = 50304, 4096
dataset = "fineweb"
batch_tokens, micro_batch = 512 * 4096, 4
optimizer = "muon"
max_steps = 25000
lr, warmup_steps = 4e-3, 1000
eval_interval, eval_tokens, save_interval = 1000, 10240 * 1024, 1000
