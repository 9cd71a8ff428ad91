# Weight decay on every γ: the default.
scale_decay = "all"
