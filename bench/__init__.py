"""Measurements: one file a question, one harness (`harness`), one list of rivals (`rivals`).

Question                                                   Run
---------------------------------------------------------  -------------------------------------
how many bytes does one step of the loss need?              python -m bench.loss_memory
how long does it take, and how near is that to the floor?   python -m bench.loss_speed
how exact are its gradients?                                python -m bench.loss_precision
what does the README's table of costs say?                  python -m bench.readme
what does a shape cost on paper?                            python -m bench.roofline --gpu h200
what should each shape cost, and each change give?          python -m bench.costs
what can this GPU do at best?                               python -m bench.ceilings
where does one sweep spend its time?                        python -m bench.parts
how long does a whole training step take?                   python -m bench.step
what machine code do the kernels become?                    python -m bench.aot
what does a row kernel's inner loop cost per column?        python -m bench.aot --loops
all of it on a GPU, in calls that resume one another        bench/gpu.sh
"""
