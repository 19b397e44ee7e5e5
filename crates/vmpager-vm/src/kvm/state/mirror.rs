//! Copies of KVM's structures that a state file can hold.

/// Declares a serializable copy of a KVM structure, field by field. What is
/// not listed (padding, and what is no state) is zero when it is loaded.
macro_rules! mirror {
    (
        $(#[$meta:meta])*
        $name:ident of $kvm:ident { $($field:ident: $type:ty),* $(,)? }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        #[cfg_attr(test, derive(proptest_derive::Arbitrary))]
        #[serde(deny_unknown_fields)]
        pub(crate) struct $name { $(pub(crate) $field: $type),* }

        impl From<kvm_bindings::$kvm> for $name {
            fn from(kvm: kvm_bindings::$kvm) -> Self {
                Self { $($field: kvm.$field.into()),* }
            }
        }

        impl From<$name> for kvm_bindings::$kvm {
            fn from(saved: $name) -> Self {
                let mut kvm = Self::default(); // some have padding
                $(kvm.$field = saved.$field.into();)*
                kvm
            }
        }
    };
}

pub(super) use mirror;
