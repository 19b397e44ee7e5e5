//! What a vCPU is about to be told: exceptions, interrupts, NMIs, SMIs.

use super::mirror::mirror;

mirror!(Exception of kvm_vcpu_events__bindgen_ty_1 {
    injected: u8, nr: u8, has_error_code: u8, pending: u8, error_code: u32,
});

mirror!(Interrupt of kvm_vcpu_events__bindgen_ty_2 { injected: u8, nr: u8, soft: u8, shadow: u8 });

mirror!(Nmi of kvm_vcpu_events__bindgen_ty_3 { injected: u8, pending: u8, masked: u8 });

mirror!(Smi of kvm_vcpu_events__bindgen_ty_4 {
    smm: u8, pending: u8, smm_inside_nmi: u8, latched_init: u8,
});

mirror!(TripleFault of kvm_vcpu_events__bindgen_ty_5 { pending: u8 });

mirror!(
    /// `flags` says which fields are valid, and comes from KVM.
    Events of kvm_vcpu_events {
        exception: Exception, interrupt: Interrupt, nmi: Nmi, sipi_vector: u32, flags: u32,
        smi: Smi, triple_fault: TripleFault, exception_has_payload: u8, exception_payload: u64,
    }
);
