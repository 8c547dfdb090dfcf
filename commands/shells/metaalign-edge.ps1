# Completion of metaalign-edge in PowerShell: metaalign-edge completion powershell | Out-String | Invoke-Expression
Register-ArgumentCompleter -Native -CommandName metaalign-edge, mae -ScriptBlock {
    param($word, $line, $cursor)
    $words = @($line.CommandElements | Select-Object -Skip 1 | Where-Object { $_.Extent.EndOffset -lt $cursor } |
        ForEach-Object { $_.ToString() })
    $last = if ($word) { $word } else { '""' }  # PowerShell before 7.3 drops an argument that is empty
    metaalign-edge completion powershell '--' @words $last 2>$null | ForEach-Object {
        $value, $says = $_ -split "`t", 2
        [System.Management.Automation.CompletionResult]::new($value, $value, 'ParameterValue', "$says ")
    }
}
