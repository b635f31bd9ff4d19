//! Writes programs for the kernel's virtual machine (RFC 9669): one method an instruction, jumps to labels.

/// A register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Register(u8);

pub(crate) const R0: Register = Register(0);
pub(crate) const R1: Register = Register(1);
pub(crate) const R2: Register = Register(2);
pub(crate) const R3: Register = Register(3);
pub(crate) const R4: Register = Register(4);
pub(crate) const R5: Register = Register(5);
pub(crate) const R6: Register = Register(6);
pub(crate) const R7: Register = Register(7);
pub(crate) const R8: Register = Register(8);
pub(crate) const R9: Register = Register(9);
/// End of the stack: places on it have negative offsets.
pub(crate) const STACK: Register = Register(10);

/// How much is read or written.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(crate) enum Size {
    Word = 0x00,
    Half = 0x08,
    Byte = 0x10,
    Double = 0x18,
}

/// What 64-bit numbers are put together by.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(crate) enum Op {
    Add = 0x00,
    Sub = 0x10,
    Multiply = 0x20,
    And = 0x50,
    ShiftLeft = 0x60,
    ShiftRight = 0x70,
    Xor = 0xa0,
    Move = 0xb0,
}

/// When a jump is taken; numbers are unsigned.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(crate) enum If {
    Equal = 0x10,
    Above = 0x20,
    AtLeast = 0x30,
    NotEqual = 0x50,
    AtMost = 0xb0,
}

/// What is done to memory at once.
#[derive(Clone, Copy)]
#[repr(i32)]
pub(crate) enum Atomic {
    /// `memory += from`
    Add = 0x00,
    /// The same, and `from` is what was there before.
    FetchAdd = 0x01,
    /// Both change places.
    Exchange = 0xe1,
}

/// The second operand.
#[derive(Clone, Copy)]
pub(crate) enum Operand {
    Register(Register),
    Number(i32),
}

impl From<Register> for Operand {
    fn from(register: Register) -> Self {
        Self::Register(register)
    }
}

impl From<i32> for Operand {
    fn from(number: i32) -> Self {
        Self::Number(number)
    }
}

// Classes of instructions, and what is added to them.
const LOAD_WIDE: u8 = 0x18;
const LOAD: u8 = 0x61;
const STORE: u8 = 0x63;
const STORE_NUMBER: u8 = 0x62;
const ATOMIC_WORD: u8 = 0xc3;
const ATOMIC_DOUBLE: u8 = 0xdb;
const ALU_64: u8 = 0x07;
const JUMP: u8 = 0x05;
const JUMP_ALWAYS: u8 = 0x05;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const BY_REGISTER: u8 = 0x08;
/// `BPF_PSEUDO_MAP_FD`
const MAP_DESCRIPTOR: u8 = 1;

/// One instruction as the kernel reads it (`struct bpf_insn`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    number: i32,
}

/// A place in the program.
#[derive(Clone, Copy)]
pub(crate) struct Label(usize);

/// A program that is being written.
#[derive(Default)]
pub(crate) struct Assembler {
    code: Vec<Instruction>,
    labels: Vec<Option<usize>>,
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    /// A label that stands nowhere yet.
    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// The label stands here.
    pub(crate) fn at(&mut self, label: Label) {
        self.labels[label.0] = Some(self.code.len());
    }

    /// `to = the memory at base + offset`
    pub(crate) fn load(&mut self, size: Size, to: Register, base: Register, offset: i16) {
        self.put(LOAD | size as u8, to, base, offset, 0);
    }

    /// `the memory at base + offset = from`
    pub(crate) fn store(&mut self, size: Size, base: Register, offset: i16, from: impl Into<Operand>) {
        match from.into() {
            Operand::Register(from) => self.put(STORE | size as u8, base, from, offset, 0),
            Operand::Number(number) => self.put(STORE_NUMBER | size as u8, base, R0, offset, number),
        }
    }

    /// Changes the memory at base + offset for all processors at once.
    pub(crate) fn atomic(&mut self, atomic: Atomic, size: Size, base: Register, offset: i16, from: Register) {
        let code = match size {
            Size::Double => ATOMIC_DOUBLE,
            _ => ATOMIC_WORD,
        };
        self.put(code, base, from, offset, atomic as i32);
    }

    /// `to = to op by`
    pub(crate) fn op(&mut self, op: Op, to: Register, by: impl Into<Operand>) {
        match by.into() {
            Operand::Register(by) => self.put(ALU_64 | BY_REGISTER | op as u8, to, by, 0, 0),
            Operand::Number(number) => self.put(ALU_64 | op as u8, to, R0, 0, number),
        }
    }

    /// `to = number`
    pub(crate) fn wide(&mut self, to: Register, number: u64) {
        self.put(LOAD_WIDE, to, R0, 0, number as u32 as i32);
        self.code.push(Instruction { number: (number >> 32) as i32, ..Instruction::default() });
    }

    /// `to = the map that this process knows by this descriptor`
    pub(crate) fn map(&mut self, to: Register, descriptor: i32) {
        self.put(LOAD_WIDE, to, Register(MAP_DESCRIPTOR), 0, descriptor);
        self.code.push(Instruction::default());
    }

    /// Goes on at the label if the two compare so.
    pub(crate) fn jump_if(&mut self, left: Register, condition: If, right: impl Into<Operand>, label: Label) {
        self.jumps.push((self.code.len(), label));
        match right.into() {
            Operand::Register(right) => self.put(JUMP | BY_REGISTER | condition as u8, left, right, 0, 0),
            Operand::Number(number) => self.put(JUMP | condition as u8, left, R0, 0, number),
        }
    }

    /// Goes on at the label.
    pub(crate) fn jump(&mut self, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.put(JUMP_ALWAYS, R0, R0, 0, 0);
    }

    /// Calls a function of the kernel: arguments in R1 to R5, which are lost, result in R0.
    pub(crate) fn call(&mut self, helper: i32) {
        self.put(CALL, R0, R0, 0, helper);
    }

    /// Ends with R0.
    pub(crate) fn exit(&mut self) {
        self.put(EXIT, R0, R0, 0, 0);
    }

    /// The whole program.
    ///
    /// # Panics
    /// When a label stands nowhere: programs do not depend on input.
    pub(crate) fn finish(mut self) -> Vec<Instruction> {
        for (from, label) in std::mem::take(&mut self.jumps) {
            let to = self.labels[label.0].expect("every label stands somewhere");
            self.code[from].offset = i16::try_from(to as isize - from as isize - 1).expect("programs are short");
        }
        self.code
    }

    fn put(&mut self, code: u8, to: Register, from: Register, offset: i16, number: i32) {
        let registers = match cfg!(target_endian = "little") {
            true => from.0 << 4 | to.0,
            false => to.0 << 4 | from.0,
        };
        self.code.push(Instruction { code, registers, offset, number });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn instructions_are_as_the_kernel_reads_them() {
        let mut program = Assembler::default();
        let end = program.label();
        program.op(Op::Move, R1, R6);
        program.load(Size::Half, R2, R1, -4);
        program.jump_if(R2, If::Above, 7, end);
        program.atomic(Atomic::Add, Size::Double, R3, 8, R2);
        program.map(R1, 5);
        program.jump(end);
        program.store(Size::Byte, STACK, -1, 9);
        program.at(end);
        program.exit();
        // RFC 9669 §3; registers: source, target.
        let expected = [
            (0xbf, 0x61, 0, 0),
            (0x69, 0x12, -4, 0),
            (0x25, 0x02, 5, 7),
            (0xdb, 0x23, 8, 0),
            (0x18, 0x11, 0, 5),
            (0, 0, 0, 0),
            (0x05, 0, 1, 0),
            (0x72, 0x0a, -1, 9),
            (0x95, 0, 0, 0),
        ];
        let expected =
            expected.map(|(code, registers, offset, number)| Instruction { code, registers, offset, number });
        assert_eq!(program.finish(), expected);
    }
}
