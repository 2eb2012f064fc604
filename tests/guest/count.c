// Counts the instructions from a kernel's first to the first of a program: a plugin of QEMU's emulator
// (-accel tcg -plugin count.so), which knows each one that is executed. What the firmware does before
// does not count, nor does time in which the processor sleeps.
//
// The kernel is one that is entered at 2 MiB or above by its physical address and then runs in the
// upper half of the address space. The result is one line on standard error: `instructions: N`.
#include <stdint.h>
#include <stdio.h>

// What is used of QEMU's interface for plugins, in the version of QEMU 11; it refuses others.
#define EXPORT __attribute__((visibility("default")))
typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*f)(struct qemu_plugin_tb *, void *), void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *block, size_t at);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *instruction);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *instruction, void (*f)(unsigned, void *), int flags, void *data);
EXPORT int qemu_plugin_version = 7;

static const uint64_t ENTRY = 2 << 20, ENTRY_END = 1 << 30, UPPER = 1ull << 63;

static enum { FIRMWARE, ENTERED, KERNEL, PROGRAM } phase;
static uint64_t count;

static void executed(unsigned cpu, void *data)
{
    uint64_t address = (uint64_t)data;
    (void)cpu;
    if (phase == FIRMWARE && address >= ENTRY && address < ENTRY_END)
        phase = ENTERED;
    else if (phase == ENTERED && address >= UPPER)
        phase = KERNEL;
    else if (phase == KERNEL && address < UPPER) {
        phase = PROGRAM;
        fprintf(stderr, "instructions: %lu\n", count);
    }
    count += phase == ENTERED || phase == KERNEL;
}

static void translated(struct qemu_plugin_tb *block, void *data)
{
    (void)data;
    for (size_t i = 0; phase != PROGRAM && i < qemu_plugin_tb_n_insns(block); i++) {
        struct qemu_plugin_insn *one = qemu_plugin_tb_get_insn(block, i);
        qemu_plugin_register_vcpu_insn_exec_cb(one, executed, 0, (void *)qemu_plugin_insn_vaddr(one));
    }
}

EXPORT int qemu_plugin_install(plugin_id id, const void *machine, int argc, char **argv)
{
    (void)machine, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated, NULL);
    return 0;
}
