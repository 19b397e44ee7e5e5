//! What is touched, by kind of access and mode; instructions in machine code.

mod events;
mod guest;
mod instructions;
mod random;
mod walks;
