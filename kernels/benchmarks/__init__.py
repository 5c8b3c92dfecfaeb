"""What coalitions cost: the evaluator against what one would write without it, each row with its machine and versions.

python -m benchmarks.engine    evaluations per second, whole models
python -m benchmarks.ops       each kernel alone, on a GPU
python -m benchmarks.table     the README's table, from the rows
python -m benchmarks.goals     what the engine promises, measured
"""
