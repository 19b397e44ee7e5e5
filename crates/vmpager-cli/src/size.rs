//! Sizes on the command line and in tables.

/// Bytes from `512M`, `2G`, `4096`, `64KiB`: powers of 1024.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B')
    {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("{unit:?} is no unit; use K, M, G or T (of 1024), as in 512M")),
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is no size; use e.g. 512M"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is more than 64 bits can count"))
}

/// Bytes for people: `512 MiB`.
pub(crate) fn show(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("4096", 4096),
            ("64K", 65536),
            ("64KiB", 65536),
            ("512M", 512 << 20),
            ("512mb", 512 << 20),
            ("2G", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "12Q", "-1", "1.5G", "99999999999999999999", "99999999T"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
