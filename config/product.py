# A peer of OR: γ = β α, with no norm in it.
reparam = "product"
