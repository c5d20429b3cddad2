//! Numbers of bytes as people write them: `4096`, `128M`, `1G`, binary units.

/// Why a text is no number of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no number of bytes: write digits and K, M, G or T (binary), such as 512M")]
pub struct SizeError(String);

/// Reads `4096`, `64K`, `128M`, `128MiB`, `1g`.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let wrong = || SizeError(text.to_owned());
    let digits_end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, suffix) = text.split_at(digits_end);
    let shift = match suffix.to_ascii_uppercase().as_str() {
        "" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_binary_and_case_does_not_matter() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("64K"), Ok(64 << 10));
        assert_eq!(parse_size("128m"), Ok(128 << 20));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("16383T"), Ok(16383 << 40));
    }

    #[test]
    fn what_is_no_size_or_over_64_bits_is_an_error_in_words() {
        for bad in ["", "M", "-1", "1.5G", "1GB", "1 G", "16777216T", "é"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(
            parse_size("1GB").unwrap_err().to_string(),
            "`1GB` is no number of bytes: write digits and K, M, G or T (binary), such as 512M"
        );
    }
}
