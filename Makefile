# The same names as ./run, for those who type make. Flags: make train ARGS="--config configs/tiny.yaml"
COMMANDS := setup demo test parity lint bench h200-env h200 interpret train infer evaluate serve convert describe help

.DEFAULT_GOAL := help
.PHONY: $(COMMANDS)

$(COMMANDS):
	@./run $@ $(ARGS)
