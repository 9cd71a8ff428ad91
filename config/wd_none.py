# No weight decay on any γ: the convention of nanoGPT and others.
scale_decay = "none"
