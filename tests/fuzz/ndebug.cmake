# ggml's debug assertions are about values: weights read from a wrong place are NaN, and no finding
add_compile_definitions(NDEBUG)
