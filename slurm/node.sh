# Run by srun, once a node: starts this node's processes, and hands stop signals on to the ranks.
# usage: node.sh SCRIPT.py ARGUMENTS...

export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='rank ${rank}: '
processes=$((SLURM_JOB_NUM_NODES * PROCESSES_PER_NODE))
(
    trap '' USR1 # torchrun dies of it; the ranks set their own handler
    if [ "$processes" -eq 1 ]; then
        exec env WORLD_SIZE=1 python "$@" # as a launcher would say: one process, whatever GPUs there are
    fi
    exec accelerate launch --config_file "$(dirname "$1")/accelerate/nodes.yaml" --num_processes "$processes" \
        --num_machines "$SLURM_JOB_NUM_NODES" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" --tee 3 "$@"
) &
launcher=$!

# Slurm with proctrack/cgroup signals this script alone, and torchrun kills ranks that take over 30 s to save once it is
# told to stop itself: so the ranks are told, and torchrun notices that they are gone. Again and again, and by a signal
# that they ignore until they can note it: some may be about to start.
tell_ranks() {
    trap '' USR1 TERM # not to lose pkill to a second signal
    while kill -0 "$launcher" 2>/dev/null; do
        if [ "$processes" -eq 1 ]; then kill -USR1 "$launcher"; else pkill -USR1 -P "$launcher"; fi
        sleep 1
    done
}
trap tell_ranks USR1 TERM
wait "$launcher" # comes back when a signal was handled
wait "$launcher"
